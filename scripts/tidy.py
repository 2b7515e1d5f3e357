#!/usr/bin/env python3
"""Holds the rooms to CONTRIBUTING.md: what a machine can check, so that review need not.

    scripts/tidy.py              check the tree; exit 1 with one line per flaw
    scripts/tidy.py --self-test  check the checks

Only Python's standard library.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOST_LINES = 500
MOST_FUNCTION = 60
#: What each crate may use of ours: arrows point down.
BELOW = {
    "transport": set(),
    "collectives": {"transport"},
    "ps": {"transport"},
    "python": {"transport", "collectives", "ps"},
    "bench": {"transport", "collectives", "ps"},
    "fuzz": {"transport", "collectives", "ps"},
}
#: The fence: unsafe code lives here and nowhere else.
UNSAFE = re.compile(
    r"transport/src/(region\.rs|cuda/|shm/|verbs/|tcp/silence\.rs)|transport/tests/(cuda|device|verbs)/|collectives/src/(reduce/|device/lent/(kernels|reach)\.rs)|ps/src/kernel\.rs|python/src/(buffer|device)\.rs"
)
#: What a room that decides must not touch.
IMPURE = {
    "TcpStream": "a socket",
    "TcpListener": "a socket",
    "UdpSocket": "a socket",
    "std::thread": "a thread",
    "Instant::now": "the clock",
    "SystemTime": "the clock",
    "std::env::": "the environment",
    "std::fs": "a file",
    "getrandom": "a random source",
    "Mutex": "a lock",
    "tracing::": "a log",
}
#: What two rooms need all the same: region.rs a lock around its ledger, since slices are given back from any thread; the
#: simulator one around the network that its wires share, and a yield where a real wire would sleep.
PURE_BUT = {
    ("transport/src/region.rs", "Mutex"),
    ("transport/src/sim/mod.rs", "Mutex"),
    ("transport/src/sim/wire.rs", "Mutex"),
    ("transport/src/sim/wire.rs", "std::thread"),
}
ENVIRONMENT = re.compile(r"std::env::(var|vars|var_os)")
MAY_READ_ENVIRONMENT = re.compile(r"(^|/)(main\.rs|bin/|bench/|python/|tests/|examples/|benches/)")
WORDS = {
    "an open end": re.compile(r"\bTO" + r"DO\b|\bFIX" + r"ME\b|\btodo!\(|\bunimplemented!\("),
    "a test that never runs": re.compile(r"#\[ignore\]"),
    "a banner": re.compile(r"^\s*(//|#)\s*[-=*#]{10,}\s*$"),
    "a path of one machine": re.compile(r"/work/|/tmp/gw|/root/"),
}


def files(root):
    """Every file that git tracks or would track, as a path from the root."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (root / name).is_file()]


def check(root):
    """Yields a line for each flaw: where, what, and what to do."""
    for name in files(root):
        kind = pathlib.PurePath(name).suffix
        if kind not in {".rs", ".py", ".sh", ".toml", ".md", ".pyi", ""} or name.endswith(".lock"):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name != "scripts/tidy.py":
            yield from words(name, text)
        if kind in {".rs", ".py"}:
            filled = sum(bool(line.strip()) for line in text.splitlines())
            if filled > MOST_LINES:
                yield f"{name}: {filled} lines that are not blank, of at most {MOST_LINES}: split the room"
        if kind == ".rs":
            yield from rust(name, text)
    for crate, below in BELOW.items():
        yield from arrows(root, crate, below)


def words(name, text):
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in WORDS.items():
            if pattern.search(line):
                yield f"{name}:{number}: {what}: {line.strip()[:80]}"


def rust(name, text):
    head = text.splitlines()[0] if text else ""
    if not head.startswith("//!"):
        yield f"{name}:1: the first line says what the room holds (`//! Pure: …` or `//! Does: …`)"
    if re.search(r"\bunsafe\s*[{]|\bunsafe (impl|fn)|allow\(unsafe_code\)", text) and not UNSAFE.search(name):
        yield f"{name}: unsafe code outside the fence (transport's region, cuda, shm, verbs and tcp/silence; the kernels; what devices lend; python's buffer and device)"
    if head.startswith("//! Pure:"):
        code = text.split("#[cfg(test)]")[0]
        for word, what in IMPURE.items():
            for number, line in enumerate(code.splitlines(), 1):
                if word in line and not line.lstrip().startswith("//") and (name, word) not in PURE_BUT:
                    yield f"{name}:{number}: a room that decides touches {what}: pass it in, or move the doing out"
    if ENVIRONMENT.search(text) and not MAY_READ_ENVIRONMENT.search(name):
        yield f"{name}: reads the environment; binaries and Python do, and pass values down"
    if not re.search(r"(^|/)tests?(/|\.rs)|benches/|examples/", name):
        yield from functions(name, text.split("#[cfg(test)]")[0])


def functions(name, text):
    """Functions of more than MOST_FUNCTION lines, by indentation: rustfmt has been here."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        found = re.match(r"(\s*)(pub(\([a-z]+\))? )?(const |async |unsafe )*fn (\w+)", line)
        if not found or line.rstrip().endswith((";", "}")):
            continue
        end = next((i for i in range(start, len(lines)) if lines[i].rstrip() == found[1] + "}"), None)
        if end is not None and end - start + 1 > MOST_FUNCTION:
            yield f"{name}:{start + 1}: fn {found[5]} has {end - start + 1} lines, of at most {MOST_FUNCTION}"


def arrows(root, crate, below):
    manifest = root / crate / "Cargo.toml"
    if not manifest.exists():
        return
    table = tomllib.loads(manifest.read_text(encoding="utf-8"))
    used = {name.removeprefix("gradwire-") for name in table.get("dependencies", {}) if name.startswith("gradwire-")}
    for wrong in sorted(used - below):
        yield f"{crate}/Cargo.toml: {crate} must not depend on {wrong}: arrows point down"


def self_test():
    """Each check finds what it is for, and passes over what is right."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        subprocess.run(["git", "init", "-q", folder], check=True)
        bad = {
            "transport/src/a.rs": "fn a() {}\n",
            "transport/src/b.rs": "//! Pure: b\nuse std::net::TcpStream;\n",
            "transport/src/c.rs": "//! Does: c\nfn c() { unsafe { d() } }\n",
            "transport/src/d.rs": "//! Does: d\nfn d() { std::env::var(\"X\"); }\n",
            "transport/src/e.rs": "//! Does: e\n" + "// line\n" * 501,
            "transport/src/f.rs": "//! Does: f\nfn f() {\n" + "    g();\n" * 60 + "}\n",
            "transport/src/g.rs": "//! Does: g\n// TO" + "DO\n",
            "collectives/Cargo.toml": '[dependencies]\ngradwire-ps = "1"\n',
        }
        good = {"transport/src/shm/h.rs": "//! Does: h\nfn h() { unsafe { i() } }\n"}
        for name, text in (bad | good).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        flaws = list(check(root))
        missed = [name for name in bad if not any(flaw.startswith(name) for flaw in flaws)]
        wrong = [flaw for flaw in flaws if not any(flaw.startswith(name) for name in bad)]
        if missed or wrong:
            sys.exit(f"tidy's self-test: not found in {missed}; wrongly found: {wrong}")
    print(f"{len(bad)} flaws found where they were put")


def main():
    if "--help" in sys.argv[1:]:
        print(__doc__)
    elif sys.argv[1:] == ["--self-test"]:
        self_test()
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        flaws = list(check(ROOT))
        print("\n".join(flaws) if flaws else "tidy: nothing to mend")
        sys.exit(bool(flaws))


if __name__ == "__main__":
    main()
