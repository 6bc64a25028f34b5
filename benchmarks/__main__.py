"""`python -m benchmarks [names] [--quick] [--json]`: all benchmarks, or the named ones, one after the other."""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules

import benchmarks


def main() -> int:
    available = [module.name for module in iter_modules(benchmarks.__path__) if not module.name.startswith("_")]
    named = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    unknown = [name for name in named if name not in available]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(available)}", file=sys.stderr)
        return 2
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    for name in named or available:
        print(f"== {name}", flush=True)
        import_module(f"benchmarks.{name}").main(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
