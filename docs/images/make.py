"""Make the README's pictures from what the commands really print, on a terminal of their own.

    python -m docs.images.make

Runs `tinfer doctor`, `tinfer serve` and a `tinfer chat` with that server, and writes serve.svg,
chat.svg and doctor.svg beside this file, and the same as plain text to standard output. Folders of
the machine it runs on are shortened, nothing else is changed.
"""

from __future__ import annotations

import io
import re
import sys
import sysconfig
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from tests.process.terminal import CTRL_C, CTRL_D, Program

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# The longest first.
SHORTER = {
    sys.executable: "~/tinfer/.venv/bin/python",
    sysconfig.get_paths()["include"]: "/usr/include/python3.11",
    str(ROOT): "~/tinfer",
    str(Path.home()): "~",
}
WIDTH = 100
# No font from the network: a picture shows what it shows without asking anybody.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
QUESTIONS = (
    "Count from 7 to 19.",
    "Repeat: blocks move once, 好",
    "Spell planet.",
    "Tell me a short story about a fox named Tim, the river and a lamp.",
)


def draw(name: str, command: str, written: str) -> None:
    """Write NAME.svg with the command and what it wrote, and print it."""
    for long, short in SHORTER.items():
        written = written.replace(long, short)
    text = f"$ {command}\n" + re.sub(r"\x1b\[\?2004[hl]", "", written.replace("\r", "")).rstrip()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text))
    console.save_svg(str(FOLDER / f"{name}.svg"), title=command, code_format=FORMAT)
    print(f"--- {name}\n{Text.from_ansi(text).plain}\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        doctor = Program(folder, "-m", "tinfer", "doctor")
        doctor.wait_end()
        doctor.close()
        draw("doctor", "bin/tinfer doctor", doctor.written)
        server = Program(folder, "-m", "tinfer", "serve")
        try:
            server.see("  started")
            server.see("\n")
            chat = Program(folder, "-m", "tinfer", "chat", "--url", "http://127.0.0.1:8000")
            chat.see("Ctrl-D leaves\n> ")
            for question in QUESTIONS:
                chat.line(question)
                chat.see("\n> ")
            chat.line("/stats")
            chat.see("\n> ")
            chat.type(CTRL_D)
            chat.wait_end()
            chat.close()
            draw("chat", "bin/tinfer chat --url http://127.0.0.1:8000", chat.written)
            draw("serve", "bin/tinfer serve", server.written)
            server.type(CTRL_C)
            server.wait_end()
        finally:
            server.close()


if __name__ == "__main__":
    main()
