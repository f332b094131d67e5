"""python -m fastunet"""

from fastunet.cli import app

app(prog_name="fastunet")
