"""One distribution, three import packages; their folders are fixed by the house (see CONTRIBUTING.md)."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "data": ["datasets>=4", "pyarrow>=21", "zstandard>=0.22"],
    "eval": ["lm-eval>=0.4.13"],
    "peft": ["peft>=0.17"],
    "tensorboard": ["tensorboard>=2.20"],
    "trl": ["trl>=1.16", "datasets>=4"],
    "lightning": ["lightning>=2.6"],
    "bench": ["peft>=0.17", "pytest-benchmark>=5"],
}
EVERY = sorted({package for extra in EXTRAS.values() for package in extra})
EXTRAS["dev"] = [*EVERY, "pytest>=8", "pytest-xdist>=3.6", "ruff", "mypy", "pre-commit"]

setup(
    name="qstar",
    version="0.1.0",
    description="Quiet-STaR: language models that think before they speak, fast enough to use",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["qstar", "qstar.*"]),
        *find_packages("kernels"),
        *find_packages("bench"),
    ],
    package_dir={"qstar_kernels": "kernels/qstar_kernels", "qstar_bench": "bench/qstar_bench"},
    package_data={
        "qstar.demo": ["tiny_lm/*"],
        "qstar.look": ["page.css", "page.html", "page.js"],
        "qstar_kernels": ["cpu_forward.c"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "accelerate>=1.1",
        "safetensors>=0.5",
        "tokenizers",
        "tqdm",
        "tabulate",
        "matplotlib",
        "pyyaml",
        "numpy",
        "fsspec",
        "psutil>=6",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["qstar = qstar.cli.main:main"]},
)
