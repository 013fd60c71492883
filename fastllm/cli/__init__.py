"""The `fastllm` command. Only what a command needs is imported, when it runs: help and versions come at once."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import __version__

# one module each, with HELP, add_arguments(parser) and execute(args)
COMMANDS = ("run", "optimize", "quantize", "sparsify", "prune", "evaluate", "env", "demo")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastllm", description="Faster large language models, patched in place.")
    top.add_argument("--version", action="version", version=f"fastllm {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f".{name}", __name__)
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--json", metavar="FILE", type=Path, help="write the figures to this file as well")
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
        command.set_defaults(execute=module.execute)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for an error, which is told in one line."""
    args = parser().parse_args(argv)
    try:
        if args.json and not args.json.absolute().parent.is_dir():
            raise OSError(f"--json {args.json}: there is no directory {args.json.absolute().parent}")
        result: dict[str, Any] = args.execute(args)
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        sys.stdout.flush()
        print(f"fastllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastllm: interrupted", file=sys.stderr)
        return 130
    return 0
