// Package snapshotter runs containerd's own snapshotter test suite on the daemon, through containerd's own
// proxy client, as containerd does with a [proxy_plugins] entry.
//
// The arguments of the test binary that are no flags are the daemon's command line; each test appends --root
// and --address and has a daemon of its own:
//
//	snapshotter.test -test.v -test.root containerd-dedup-grpc
package snapshotter

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/pkg/dialer"
	"github.com/containerd/containerd/pkg/testutil"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc"
)

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 5 * time.Second // the daemon's promise
)

func TestSnapshotter(t *testing.T) {
	testutil.RequiresRoot(t)
	if flag.NArg() == 0 {
		t.Fatal("the daemon's command line is missing")
	}
	testsuite.SnapshotterSuite(t, "dedup", newSnapshotter)
}

// newSnapshotter starts a daemon on root. The function that it returns stops the daemon.
func newSnapshotter(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	d, err := startDaemon(root, flag.Args())
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.Dial(
		dialer.DialAddress(d.address),
		grpc.WithInsecure(),
		grpc.WithContextDialer(dialer.ContextDialer),
	)
	if err != nil {
		return nil, nil, d.explain(first(err, d.stop()))
	}
	cleanup := func() error {
		return d.explain(first(conn.Close(), d.stop(), release(root), nothingMountedBelow(root)))
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "dedup"), cleanup, nil
}

// daemon is a running one. Its socket and its log are in a directory of their own with a short name.
type daemon struct {
	command   *exec.Cmd
	directory string
	address   string
	exited    chan error // what Wait returned
}

func startDaemon(root string, command []string) (*daemon, error) {
	directory, err := os.MkdirTemp("", "d-")
	if err != nil {
		return nil, err
	}
	d := &daemon{directory: directory, address: filepath.Join(directory, "s"), exited: make(chan error, 1)}
	log, err := os.Create(d.logPath())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	arguments := append(append([]string{}, command[1:]...), "--root", root, "--address", d.address)
	d.command = exec.Command(command[0], arguments...)
	d.command.Stdout, d.command.Stderr = log, log
	if err := d.command.Start(); err != nil {
		return nil, err
	}
	go func() { d.exited <- d.command.Wait() }()
	if err := d.waitForSocket(); err != nil {
		d.command.Process.Kill()
		return nil, d.explain(err)
	}
	return d, nil
}

func (d *daemon) waitForSocket() error {
	deadline := time.After(startTimeout)
	for {
		if conn, err := net.Dial("unix", d.address); err == nil {
			return conn.Close()
		}
		select {
		case err := <-d.exited:
			return fmt.Errorf("the daemon ended at its start: %v", err)
		case <-deadline:
			return fmt.Errorf("the daemon does not listen after %s", startTimeout)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// stop fails unless SIGTERM makes the daemon exit with 0 in time; it has ended in any case.
func (d *daemon) stop() error {
	if err := d.command.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("the daemon did not wait for SIGTERM: %w", err)
	}
	select {
	case err := <-d.exited:
		if err != nil {
			return fmt.Errorf("the daemon after SIGTERM: %w", err)
		}
		return nil
	case <-time.After(stopTimeout):
		d.command.Process.Kill()
		<-d.exited
		return fmt.Errorf("the daemon runs %s after SIGTERM", stopTimeout)
	}
}

// explain adds the daemon's log to an error, and removes the directory that the log is in.
func (d *daemon) explain(err error) error {
	defer os.RemoveAll(d.directory)
	if err == nil {
		return nil
	}
	log, _ := os.ReadFile(d.logPath())
	return fmt.Errorf("%w; the daemon's log:\n%s", err, log)
}

func (d *daemon) logPath() string { return filepath.Join(d.directory, "log") }

// release makes the root removable: a daemon that stops leaves its mounts, whose mountpoints are immutable.
func release(root string) error {
	points, err := filepath.Glob(filepath.Join(root, "mounts", "*"))
	if err != nil || len(points) == 0 {
		return err
	}
	for _, point := range points {
		if err := syscall.Unmount(point, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	return exec.Command("chattr", append([]string{"-i"}, points...)...).Run()
}

func nothingMountedBelow(root string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("still mounted: %s", mounts[0].Mountpoint)
	}
	return nil
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
