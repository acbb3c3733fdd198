"""Sessions: demo, tests, oldest, lint, types, docs, models_page, bench, examples, train_testbed.

Needs nox with uv: pip install 'nox[uv]'.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True

# torch and torchvision come from one registry: the CPU build of torch breaks torchvision.
MODEL = ["torch", "torchvision", "transformers"]
TESTS = [
    # With pytest 9.2, pytest-xdist 3.8 loses the groups that share an expensive set-up.
    *(
        "pytest<9.2",
        "pytest-xdist",
        "hypothesis",
        "scipy",
        "sam2",
        "fastapi",
        "uvicorn",
        "rich",
        "requests",
    ),
    *("accelerate", "bitsandbytes", "datasets", "scikit-image", "scikit-learn", "timm"),
]
DOCS = ["sphinx", "myst-nb", "furo", "ipykernel", "nbconvert"]
# One thread is the fastest for models this small; several on a busy machine wait for each other.
SMALL = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
TRAINING = {"HF_HUB_OFFLINE": "1"}


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on the embedded testbed: leaves demo/index.html and the records behind it."""
    session.install(".[report]")
    session.run("python", "examples/demo.py", *session.posargs, env=SMALL)


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite, with lint, types, docs and examples: one environment serves them all."""
    session.install("-e", ".[chat,report,table]", *MODEL, *TESTS, "ruff", "mypy", *DOCS)
    if session.posargs:
        session.run("pytest", *session.posargs, env=SMALL)
        return
    _lint(session)
    _types(session)
    session.run("pytest", "-n", "2", "--dist", "loadgroup", env=SMALL)
    _docs(session)
    _examples(session)
    session.notify("oldest")


# What these test does not depend on the release of transformers.
INDEPENDENT = [
    *("annotations", "architecture", "chat", "kernel", "replies", "score", "study_runs", "worked"),
    *("concepts", "domains", "domains_chance", "figures", "metrics", "metrics_judges", "questions"),
    "testbed_domains",
]


@nox.session
def oldest(session: nox.Session) -> None:
    """The suite on the oldest transformers of the range that pyproject.toml declares."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    needed = next(each for each in project["dependencies"] if each.startswith("transformers"))
    release = needed.split(">=")[1].split(",")[0]
    packages = [each for each in MODEL if each != "transformers"]
    session.install("-e", ".[chat,report,table]", *packages, f"transformers=={release}.0", *TESTS)
    ignored = [f"--ignore=tests/test_{name}.py" for name in INDEPENDENT]
    session.run("pytest", "-n", "2", "--dist", "loadgroup", *ignored, *session.posargs, env=SMALL)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and common mistakes (ruff)."""
    session.install("ruff")
    _lint(session)


@nox.session
def types(session: nox.Session) -> None:
    """Types of the library (mypy, strict)."""
    session.install("-e", ".[chat,report,table]", *MODEL, "mypy")
    _types(session)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation; warnings are errors."""
    session.install("-e", ".[chat,photographs,report,table]", *MODEL, *DOCS)
    _docs(session)


@nox.session
def models_page(session: nox.Session) -> None:
    """The page of supported models, written anew from the models of tests/zoo (under a minute)."""
    session.install("-e", ".", *MODEL, "timm")
    session.run("python", "docs/generate_models.py", env=SMALL)


@nox.session
def bench(session: nox.Session) -> None:
    """The page of benchmarks, measured anew (about 20 minutes on 2 idle cores), also on a GPU.

    `--quick` tries whether it works, `--only NAMES` measures a part, `--json` keeps numbers.
    """
    session.install("-e", ".[chat,report,table]", *MODEL, "scikit-image")
    session.run("python", "docs/generate_benchmarks.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Every script and notebook in examples/, executed on the testbed."""
    session.install("-e", ".[chat,photographs,report,table]", *MODEL, *DOCS)
    _examples(session)


@nox.session
def train_testbed(session: nox.Session) -> None:
    """Retrain the testbed from nothing (about 15 minutes on 2 cores) and report its accuracy."""
    session.install("-e", ".", *MODEL)
    out = session.posargs or ["--out", str(Path(session.create_tmp()) / "testbed")]
    session.run("python", "-m", "neuronlens.testbed.train", *out, env=TRAINING)


def _lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


def _types(session: nox.Session) -> None:
    session.run("mypy")


def _docs(session: nox.Session) -> None:
    session.run(
        "python",
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "docs",
        "docs/_build/html",
        env=SMALL,
    )


def _examples(session: nox.Session) -> None:
    tmp = Path(session.create_tmp())
    for script in sorted(Path("examples").glob("*.py")):
        session.run("python", str(script), "--out", str(tmp / script.stem), env=SMALL)
    for notebook in sorted(Path("examples").glob("*.ipynb")):
        session.run(
            "jupyter",
            "nbconvert",
            "--to",
            "html",
            "--execute",
            str(notebook),
            "--output-dir",
            str(tmp),
            env=SMALL,
        )
