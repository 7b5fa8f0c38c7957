"""`python -m tinfer.worker.kv_bench [OPTIONS]`: for a machine that has torch and little else.

OPTIONS is a JSON object, see `HandoffOptions`.
"""

import sys

import msgspec

from tinfer.errors import StartError
from tinfer.worker.kv_bench.app import run
from tinfer.worker.kv_bench.options import HandoffOptions

if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else "{}"
    try:
        sys.exit(run(msgspec.json.decode(given, type=HandoffOptions)))
    except (StartError, msgspec.DecodeError) as error:
        sys.exit(f"kv_bench: {error}")
