"""The sources call nothing that executes what it reads; seen in the syntax tree, name by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "halfbyte"

# Modules whose readers execute what they read, and the files that may import them: rows that do
# not fit into memory lie in a file of this process without a name, which nobody else can write.
EXECUTING = {
    "pickle": {
        "data/table.py",
        "data/example_store.py",
        # What a parent writes and its own worker reads; the way back is JSON.
        "data/template_process.py",
        "data/template_worker.py",
    },
    "marshal": {"data/example_store.py"},
    "runpy": {"export/elsewhere/worker_frame.py"},  # one of the two workers beside it
    **{
        name: set[str]()
        for name in ("dill", "cloudpickle", "joblib", "shelve", "code", "codeop", "pty")
    },
}
# Functions that execute what they read, or unpack it wherever it says.
CALLS = {
    *("torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.export.load"),
    *("torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.utils.cpp_extension.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "breakpoint"),
    *("pandas.read_pickle", "numpy.lib.format.read_array", "numpy.ctypeslib.load_library"),
    *("tarfile.open", "shutil.unpack_archive", "importlib.reload"),
    *("datasets.load_dataset", "datasets.load_from_disk", "huggingface_hub.load_torch_model"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "jinja2.Environment"),
    *("jinja2.sandbox.SandboxedEnvironment", "jinja2.Template"),
}
METHODS = {
    "extractall",
    "get_chat_template",
    "apply_chat_template",
    "render_jinja_template",
    "_compile_jinja_template",
}
CLASSES = {
    *("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.constructor.Constructor"),
    *("yaml.constructor.UnsafeConstructor", "yaml.constructor.FullConstructor"),
}
ALLOWED = {
    # The report's own templates, which come with the package.
    ("report/html.py", "jinja2.Environment"),
    # Only names that are written there, in lists.
    ("run/__init__.py", "a module by a name that is not written here"),
    ("run/ahead.py", "a module by a name that is not written here"),
    ("trackers/worker.py", "a module by a name that is not written here"),
    ("run/bench_trl.py", "a module by a name that is not written here"),
    # Types of numbers, of a request that this process wrote.
    ("kernels/trial/base.py", "an attribute of torch by a name that is not written here"),
}
# What takes a model's folder may take its code; it must be told not to, or it asks at a terminal.
AUTO = {"from_pretrained", "from_config"}


def names_of(tree: ast.Module) -> dict[str, str]:
    """Name in the file: what it stands for, in full."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``; of what is no chain of names its last part."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(names.get(node.id, node.id))
    return ".".join(reversed(parts))


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def faults(source: str, file: str) -> list[str]:
    """What ``source``, under the name ``file`` in the package, does that it should not."""
    tree = ast.parse(source)
    names = names_of(tree)
    found = []

    def note(node: ast.AST, what: str) -> None:
        if (file, what) not in ALLOWED:
            found.append(f"{file}:{getattr(node, 'lineno', 0)} {what}")

    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{name}" for name in modules)]
            for module in modules:
                if file not in EXECUTING.get(module.split(".")[0], {file}):
                    note(node, f"import {module}")
                if module in CALLS | CLASSES:
                    note(node, module)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load):
            # Named at all is enough: it may be called under another name.
            name = full_name(node, names)
            if name in CALLS | CLASSES or (
                isinstance(node, ast.Attribute) and node.attr in METHODS
            ):
                note(node, name)
        if isinstance(node, (ast.List, ast.Tuple)):
            words = [full_name(one, names) or getattr(one, "value", "") for one in node.elts]
            if words[:1] == ["sys.executable"] and "-m" in words and "-P" not in words:
                note(node, "a module looked for in the working directory first")
        if isinstance(node, ast.Call):
            for what in call_faults(node, names):
                note(node, what)
    return found


def call_faults(node: ast.Call, names: dict[str, str]) -> list[str]:
    found = []
    name = full_name(node.func, names)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if "trust_remote_code" in given and not is_constant(given["trust_remote_code"], False):
        found.append("trust_remote_code")
    *_, owner, method = ["", "", *name.split(".")]
    if method in AUTO and owner.startswith("Auto") and "trust_remote_code" not in given:
        found.append(f"{name} without trust_remote_code=False")
    if "shell" in given and not is_constant(given["shell"], False):
        found.append("shell")
    if "allow_pickle" in given and not is_constant(given["allow_pickle"], False):
        found.append("allow_pickle")
    if name == "numpy.load" and "allow_pickle" not in given:
        found.append("numpy.load without allow_pickle=False")
    if method == "import_module" and not isinstance(node.args[0], ast.Constant):
        found.append("a module by a name that is not written here")
    if name.startswith("subprocess.") and node.args and isinstance(node.args[0], ast.JoinedStr):
        found.append("a command in one text")
    if method == "getattr" and len(node.args) == 2 and not isinstance(node.args[1], ast.Constant):
        module = names.get(getattr(node.args[0], "id", ""), "")
        if module in ("torch", "numpy", "os", "builtins", "transformers"):
            found.append(f"an attribute of {module} by a name that is not written here")
    return found


def test_nothing_that_is_read_is_executed() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 200
    found = []
    for path in files:
        file = path.relative_to(PACKAGE).as_posix()
        found += faults(path.read_text(encoding="utf-8"), file)
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "import torch as t\nread = t.load",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=flag)",
        "def f():\n    import pickle",
        "from pickle import loads",
        "import joblib, dill",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nclass Mine(yaml.UnsafeLoader): pass",
        "eval('1')",
        "run = exec",
        "import subprocess\nsubprocess.run(words, shell=True)",
        "import subprocess\nsubprocess.run(f'ls {name}')",
        "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained(path)",
        "import transformers\ntransformers.AutoConfig.from_pretrained(p, trust_remote_code=ask)",
        "import datasets\ndatasets.load_from_disk(path)",
        "from jinja2 import Environment\nEnvironment()",
        "import jinja2\njinja2.Environment()",
        "tokenizer.apply_chat_template(messages)",
        "archive.extractall(folder)",
        "import torch\ngetattr(torch, name)",
        "from importlib import import_module\nimport_module(name)",
        "import sys\ncommand = [sys.executable, '-m', 'pip']",
    ],
)
def test_it_would_be_seen(source: str) -> None:
    assert faults(source, "model/folder.py")


def test_what_is_harmless_passes() -> None:
    source = (
        "import numpy as np\nimport yaml\nimport subprocess\nfrom transformers import AutoConfig\n"
        "np.load(path, allow_pickle=False)\nyaml.safe_load(text)\nmodel.eval()\n"
        "subprocess.run([program, path])\nAutoConfig.from_pretrained(p, trust_remote_code=False)\n"
    )
    assert faults(source, "model/folder.py") == []
