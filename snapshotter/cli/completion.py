"""Completion scripts for shells, from the argument tree (shtab), with the names of snapshots.

A name is whatever a client chose. bash's `compgen -W` would expand `$(…)` in it, so names are
compared by bash itself, and only those made of plain characters are offered.
"""

from __future__ import annotations

import argparse
import re

_PLAIN = "^[A-Za-z0-9_/@%+][A-Za-z0-9_./:@%+=,-]*$"

_BASH_NAMES = f"""\
_snapctl_names() {{
  local name
  while IFS= read -r name; do
    if [[ $name == "$1"* ]]; then printf '%s\\n' "$name"; fi
  done < <(snapctl ls --names 2>/dev/null | LC_ALL=C grep -E '{_PLAIN}')
}}
"""

# bash splits words at colons, which names like sha256:… are full of. So the words are split again at
# blanks only, and what precedes the last colon is cut from the answers, since bash will not replace it.
_BASH_ENTRY = """
_snapctl() {
  local line="${COMP_LINE:0:COMP_POINT}" typed index
  local -a words
  read -ra words <<<"$line"
  if [[ $line == *[[:space:]] ]]; then words+=(""); fi
  local -a COMP_WORDS=("${words[@]}")
  local COMP_CWORD=$((${#words[@]} - 1))
  _shtab_snapctl
  typed="${words[COMP_CWORD]}"
  if [[ $typed == *:* && $COMP_WORDBREAKS == *:* ]]; then
    for index in "${!COMPREPLY[@]}"; do
      COMPREPLY[index]="${COMPREPLY[index]#"${typed%:*}:"}"
    done
  fi
}
complete -o bashdefault -F _snapctl snapctl
"""

_ZSH_NAMES = f"""\
_snapctl_names() {{
  local -a names
  names=(${{(f)"$(snapctl ls --names 2>/dev/null | LC_ALL=C grep -E '{_PLAIN}')"}})
  compadd -a names
}}
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that makes `shell` ("bash" or "zsh") complete the commands of `parser`."""
    import shtab  # takes as long as all other imports together

    if shell == "bash":
        return str(shtab.complete(parser, shell, preamble=_BASH_NAMES)) + "\n" + _BASH_ENTRY
    # shtab lets an argument that may be repeated be completed once; "*:" is zsh's word for every time.
    return re.sub(r'"\(\*\)::?', '"*:', str(shtab.complete(parser, shell, preamble=_ZSH_NAMES)))
