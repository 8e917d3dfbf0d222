"""Who may import whom, read from the source; and what `import subsetopt` may cost."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports from the lines above its own only.
LAYERS = [
    {"pages", "progress", "timing"},
    {"checks"},
    {"losses", "growth", "linesearch", "linalg"},
    {"model"},
    {"devices"},
    {"drivers"},
    {"problem"},
    {"solve", "checkpoint", "curvature", "kronecker"},
    {"lbfgs", "gauss_newton", "finetune"},
    {"fit"},
    {"__init__"},
]
# These are for the loops over steps alone: a method knows nothing of files and screens.
LOOPS_ONLY = {"checkpoint", "progress"}
CONTRACT = """fit_subset finetune FitResult FinetuneResult Progress Status Growth draw_order
    overdetermination_ratio LBFGS GaussNewton Solver"""
PUBLIC = set(CONTRACT.split())
DEVICE_NAMES = {"pmap", "psum", "pmean", "local_devices", "device_count", "local_device_count"}
EXPERIMENT_LIBRARIES = {"data", "jobs", "models", "peers", "problems", "races", "records", "runs"}
KERNELS = {"linalg", "curvature"}  # modules that a benchmark may time by themselves
HEAVY = "matplotlib tensorflow_datasets sklearn scipy.optimize rich orbax flax.linen flax.nnx"


def imported(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of all imports, wherever they stand; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def inside(names: set[str], package: str) -> set[str]:
    """The part after `package.` of the names below it: its modules, or its public names."""
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


def mentioned(tree: ast.AST) -> set[str]:
    """Names that the code uses, dotted ones also in full, for `jax.devices` is not `devices`."""
    dotted = imported(tree, "")
    dotted |= {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute | ast.Name)}
    return dotted | {name.rsplit(".", 1)[-1] for name in dotted}


def faults_in_subsetopt(module: str, source: str) -> set[str]:
    """What a module of the package says that its layer may not."""
    tree = ast.parse(source)
    layer = next((i for i, names in enumerate(LAYERS) if module in names), None)
    if layer is None:
        return {f"{module} is in no layer"}
    allowed = set().union(*LAYERS[:layer])
    if module not in {"fit", "finetune"}:
        allowed -= LOOPS_ONLY
    used = inside(imported(tree, "subsetopt"), "subsetopt")
    faults = {f"imports {name}" for name in used - allowed}
    if module != "devices":
        faults |= {f"says {name}" for name in mentioned(tree) & (DEVICE_NAMES | {"jax.devices"})}
    return faults


def faults_in_experiments(source: str) -> set[str]:
    """Imports of anything but public names of subsetopt and the shared modules of experiments."""
    tree = ast.parse(source)
    names = imported(tree, "experiments")
    attributes = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    private = inside(names | attributes, "subsetopt") - PUBLIC - KERNELS
    others = inside(names, "experiments") - EXPERIMENT_LIBRARIES
    return {f"subsetopt.{name}" for name in private} | {f"experiments.{name}" for name in others}


def faults_in_figures(source: str) -> set[str]:
    """Imports of what computes: figures are drawn from records alone."""
    names = imported(ast.parse(source), "paper_figures")
    return {name for name in names if name.split(".")[0] in {"jax", "jaxlib", "flax", "subsetopt"}}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize("path", sources("subsetopt"), ids=lambda path: path.stem)
def test_module_imports_only_the_layers_below_it(path: Path):
    assert not faults_in_subsetopt(path.stem, path.read_text())


@pytest.mark.parametrize("path", sources("experiments"), ids=lambda path: path.stem)
def test_experiments_use_public_names_and_never_one_another(path: Path):
    assert not faults_in_experiments(path.read_text())


@pytest.mark.parametrize("path", sources("paper_figures"), ids=lambda path: path.stem)
def test_figures_import_nothing_that_computes(path: Path):
    assert not faults_in_figures(path.read_text())


def test_every_package_is_found():
    assert all(map(sources, ["subsetopt", "experiments", "paper_figures"]))


def test_public_names_are_those_of_the_contract():
    tree = ast.parse((ROOT / "subsetopt/__init__.py").read_text())
    assert {name.rsplit(".", 1)[-1] for name in imported(tree, "subsetopt")} == PUBLIC


@pytest.mark.parametrize(
    ("module", "source", "faults"),
    [
        ("problem", "from subsetopt.fit import fit_subset", {"imports fit"}),
        ("problem", "def f():\n    from . import fit", {"imports fit"}),
        ("problem", "import subsetopt.solve as s", {"imports solve"}),
        ("lbfgs", "from subsetopt import gauss_newton", {"imports gauss_newton"}),
        ("lbfgs", "from subsetopt.progress import Bar", {"imports progress"}),
        ("solve", "import jax\njax.lax.psum(1, 'data')", {"says psum"}),
        ("solve", "from jax.lax import psum as add", {"says psum"}),
        ("fit", "import jax\njax.devices()", {"says jax.devices"}),
        ("fit", "from jax import pmap, devices", {"says pmap", "says jax.devices"}),
        ("extra", "", {"extra is in no layer"}),
        ("fit", "from subsetopt import problem\ndevices = problem.devices", set()),
        ("devices", "import jax\njax.pmap(f, devices=jax.local_devices())", set()),
    ],
)
def test_checker_sees_faults_of_the_package(module: str, source: str, faults: set[str]):
    assert faults_in_subsetopt(module, source) == faults


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("from subsetopt.problem import Problem", {"subsetopt.problem"}),
        ("import subsetopt\nsubsetopt.fit.run()", {"subsetopt.fit"}),
        ("from experiments.demo import main", {"experiments.demo"}),
        ("from . import demo, data", {"experiments.demo"}),
        ("from experiments import models\nfrom subsetopt import LBFGS", set()),
    ],
)
def test_checker_sees_faults_of_experiments(source: str, faults: set[str]):
    assert faults_in_experiments(source) == faults


def test_checker_sees_faults_of_figures():
    source = "import jax.numpy as jnp\nfrom subsetopt import LBFGS\nimport json, jaxtyping"
    assert faults_in_figures(source) == {"jax.numpy", "subsetopt.LBFGS"}


def test_import_of_subsetopt_loads_nothing_heavy(run_python):
    code = """if True:
        import sys, jax, optax
        before = set(sys.modules)
        import subsetopt
        print(*set(sys.modules) - before)"""
    assert not set(HEAVY.split()) & set(run_python("-c", code).split())


def test_figures_load_nothing_that_computes(run_python):
    modules = [f"paper_figures.{path.stem}" for path in sources("paper_figures")]
    load = ", ".join(name for name in modules if not name.endswith("__"))
    loaded = run_python("-c", f"import sys, {load or 'paper_figures'}; print(*sys.modules)").split()
    assert not {"jax", "flax", "subsetopt"} & set(loaded)
