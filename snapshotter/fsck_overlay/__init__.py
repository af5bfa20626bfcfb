"""fsck.overlay: checks and repairs the directories behind an overlay that is not mounted, whoever made it.

options     what -o says
in_use      whether an overlay somewhere has the directories mounted
layers      the directories, read without following a symlink
handles     the file handles that overlayfs stores
lookup      how the kernel finds a name in a stack of layers
findings    everything that can be found, and what mends it
tree        one pass over each layer
claims      which redirect has which directory of a lower layer
index       the work directory's index
check       all checks of one overlay
repair      the steps that mend a finding
command     the command line
"""
