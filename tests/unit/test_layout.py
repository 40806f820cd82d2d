"""House rules that a machine can check: names, sizes, one door per heavy library, nothing loaded that executes."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sltscale"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")])

# Which files may import a library, as patterns from the repository root.
DOORS = {
    "deepspeed": ("sltscale/engine/*.py",),
    "webdataset": ("sltscale/data/shards/tars.py",),
    "av": (
        "sltscale/data/video/stored.py",
        "sltscale/data/video/cutting.py",
        "sltscale/data/video/encoding.py",
        "sltscale/data/synthetic/*.py",
        "tools/bench_*.py",
    ),
    "transformers": (
        "sltscale/models/frames.py",
        "sltscale/models/dino.py",
        "sltscale/models/language.py",
        "sltscale/models/mbart.py",
        "sltscale/models/mt5.py",
        "sltscale/models/causal.py",
        "sltscale/models/decoding.py",
        "sltscale/models/sampling.py",
        "sltscale/models/language_attention.py",
        "sltscale/data/text.py",
        "sltscale/evaluation/bleurt.py",
    ),
    "tokenizers": ("sltscale/models/frames.py", "sltscale/models/language.py", "sltscale/data/text.py"),
    "peft": ("sltscale/models/*.py",),
    "sacrebleu": ("sltscale/evaluation/translation.py",),
}
EXECUTING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The one reader of pickled labels: it admits an instruction only if strings, numbers, lists or dicts need it, and its
# unpickler refuses every name.
UNPICKLER = "sltscale/data/annotations/labels.py"


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all modules imported anywhere in a file, also inside functions and by importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "importlib.import_module", "__import__"}:
            yield from (
                str(argument.value).split(".")[0] for argument in node.args[:1] if isinstance(argument, ast.Constant)
            )


def called(call: ast.Call) -> str:
    """``torch.load`` for torch.load(...), ``.extractall`` for anything().extractall(...)."""
    parts = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


def faults(source: str) -> list[str]:
    """What in this source could execute something that it reads."""
    tree = ast.parse(source)
    modules = set(imported(tree))
    found = [f"imports {name}" for name in sorted(modules & EXECUTING_MODULES)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        last = name.split(".")[-1]
        keywords = {
            keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else "an expression"
            for keyword in node.keywords
        }
        rules = {
            "torch.load without weights_only=True": name == "torch.load" and keywords.get("weights_only") is not True,
            "extractall": last in {"extractall", "unpack_archive"},
            "os.system": name in {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"},
            "shell": keywords.get("shell", False) is not False,
            "pickle's own loading": name in {"pickle.load", "pickle.loads", "pickle.Unpickler"},
            "eval or exec": name in {"eval", "exec", "compile", "builtins.eval", "builtins.exec"},
            "allow_pickle": keywords.get("allow_pickle", False) is not False,
            "trust_remote_code": keywords.get("trust_remote_code", False) is not False,
            # webdataset's decode() runs code from .pyd and .pkl members; bytes say what they decode to
            "bare decode": "webdataset" in modules
            and last == "decode"
            and not (node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value in ("utf-8", "ascii")),
        }
        found += [f"line {node.lineno}: {rule}" for rule, broken in rules.items() if broken]
    return found


def test_there_is_something_to_check() -> None:
    assert {"sltscale/config.py", "sltscale/evaluation/translation.py"} <= {where(path) for path in SOURCES}


# `deepspeed sltscale/train.py` puts sltscale/ itself at the head of sys.path, `python tools/x.py` tools/: a file there
# that is named like another module takes its place in every import of the process.
@pytest.mark.parametrize("folder", ["sltscale", "tools"])
def test_no_name_hides_another_module(folder: str) -> None:
    ours = {
        path.stem
        for path in (ROOT / folder).iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name.isidentifier())
    }
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    heavy = {"torch", "deepspeed", "transformers", "tokenizers", "datasets", "evaluate", "accelerate", "peft", "wandb"}
    assert sorted(ours & (installed | heavy)) == []


@pytest.mark.parametrize("path", SOURCES, ids=where)
def test_files_hold_one_subject(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert path.stem not in {"utils", "util", "misc", "helpers", "helper", "common", "tools"}


@pytest.mark.parametrize("path", SOURCES, ids=where)
def test_one_door_per_heavy_library(path: Path) -> None:
    modules = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    through_the_wall = [
        library
        for library, doors in DOORS.items()
        if library in modules and not any(Path(where(path)).match(door) for door in doors)
    ]
    assert through_the_wall == []


@pytest.mark.parametrize("path", SOURCES, ids=where)
def test_nothing_read_is_executed(path: Path) -> None:
    admitted = ["imports pickle"] if where(path) == UNPICKLER else []
    assert faults(path.read_text(encoding="utf-8")) == admitted


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "pickle.loads(content)",
        "pickle.Unpickler(file).load()",
        "def f():\n    from dill import loads",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "tarfile.open(p).extractall(d)",
        "os.system('ls')",
        "subprocess.run(c, shell=True)",
        "subprocess.run(c, shell=flag)",
        "eval(text)",
        "exec(text)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "import webdataset as wds\nwds.WebDataset(u).decode()",
        "import webdataset as wds\nd = wds.WebDataset(u)\nd.decode('rgb')",
        "import importlib\nimportlib.import_module('pickle')",
    ],
)
def test_the_check_finds_each_fault(source: str) -> None:
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "model.eval()",
        "re.compile('x')",
        "subprocess.run(['ls'], shell=False)",
        "import webdataset\nname.decode('utf-8')",
        "payload.decode()",
        "np.load(f, allow_pickle=False)",
    ],
)
def test_the_check_lets_the_harmless_pass(source: str) -> None:
    assert faults(source) == []


def test_the_door_check_sees_hidden_imports() -> None:
    tree = ast.parse("def f():\n    import av.video as v\n    from deepspeed.ops import x\n    __import__('sacrebleu')")
    assert set(imported(tree)) == {"av", "deepspeed", "sacrebleu"}


def test_nothing_large_is_in_the_repository() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name.decode("utf-8") for name in listed.stdout.split(b"\0") if name]
    large = [where(path) for path in paths if path.is_file() and path.stat().st_size > 500_000]
    assert paths and large == []
