// Applies containerd's filters, for comparison: reads one JSON case a line, writes one JSON verdict a line.
package main

import (
	"bufio"
	"encoding/json"
	"io"
	"log"
	"os"
	"regexp"
	"strings"

	"github.com/containerd/containerd/filters"
	"github.com/sirupsen/logrus"
)

type info struct {
	Name   string            `json:"name"`
	Parent string            `json:"parent"`
	Kind   string            `json:"kind"`
	Labels map[string]string `json:"labels"`
}

// Field reads what containerd's adaptSnapshot (snapshots/storage/bolt.go, not exported) would.
func (i info) Field(path []string) (string, bool) {
	switch path[0] {
	case "name":
		return i.Name, true
	case "parent":
		return i.Parent, true
	case "kind":
		return i.Kind, true
	case "labels":
		value, ok := i.Labels[strings.Join(path[1:], ".")]
		return value, ok
	}
	return "", false
}

// Bytes are base64 in JSON: expressions and messages need not be UTF-8.
type testCase struct {
	Filters  []string `json:"filters"`
	Patterns [][]byte `json:"patterns"`
	Infos    []info   `json:"infos"`
}

// Error is empty when the filters are good, Wrong has the patterns that are no regular expressions.
type verdict struct {
	Error   []byte   `json:"error"`
	Wrong   [][]byte `json:"wrong"`
	Matches []bool   `json:"matches"`
}

func judge(c testCase) verdict {
	filter, err := filters.ParseAll(c.Filters...)
	if err != nil {
		return verdict{Error: []byte(err.Error())}
	}
	v := verdict{Wrong: [][]byte{}, Matches: []bool{}}
	for _, p := range c.Patterns {
		if _, err := regexp.Compile(string(p)); err != nil {
			v.Wrong = append(v.Wrong, p)
		}
	}
	for _, i := range c.Infos {
		v.Matches = append(v.Matches, filter.Match(i))
	}
	return v
}

func main() {
	logrus.SetOutput(io.Discard) // a line for each match of a wrong regular expression
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	out := bufio.NewWriter(os.Stdout)
	encoder := json.NewEncoder(out)
	for {
		var c testCase
		if err := in.Decode(&c); err == io.EOF {
			break
		} else if err != nil {
			log.Fatal(err)
		}
		if err := encoder.Encode(judge(c)); err != nil {
			log.Fatal(err)
		}
	}
	if err := out.Flush(); err != nil {
		log.Fatal(err)
	}
}
