"""Packaging of nemo_rmt. The top-level ``recipes`` folder installs as ``nemo_rmt.recipes``."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"

setup(
    name="nemo-rmt",
    version="0.1.0",
    description="Reinforcement-guided mid-training (ReMiT, RMT, the flywheel) on Megatron-Core and NeMo",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["nemo_rmt", "nemo_rmt.*"]), "nemo_rmt.recipes"],
    package_dir={"nemo_rmt": "nemo_rmt", "nemo_rmt.recipes": "recipes"},
    package_data={
        "nemo_rmt.recipes": ["*.yaml", "*/*.yaml"],
        "nemo_rmt.report": ["*.j2"],
        "nemo_rmt.stages.lm_eval": ["*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.15.3,<0.17",
        # Megatron's checkpoint save hangs without it, and does not declare it
        "psutil>=5.9",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "jinja2>=3.1",
        "rich>=13.0",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
    ],
    # NVIDIA Apex is not on PyPI: the package called apex there is something else. See the README.
    extras_require={
        # trl: an independent GRPO loss to compare with
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "reasoning-gym==0.1.25",
            "datasets>=3.0",
            'trl==1.16.0; python_version >= "3.11"',
        ],
        # leptonai 0.47 lost the module that nemo_run 0.11.1 imports
        "nemo": ["nemo_run==0.11.1", "leptonai>=0.26.6,<0.47"],
        # Parquet and Arrow tables, and the Hugging Face hub
        "data": ["pyarrow>=14", "datasets>=3.0"],
        "bridge": ["megatron-bridge==0.3.1"],
        "vllm": ["vllm>=0.32,<0.33"],
        # it takes transformers and accelerate as they come, and needs both for Hugging Face models
        "lm-eval": ["lm-eval>=0.4.13,<0.5", "transformers>=4.57", "accelerate>=0.26"],
        "fp8": ["transformer-engine[pytorch]>=2.0"],
        "reasoning": ["reasoning-gym==0.1.25"],
        "wandb": ["wandb>=0.18"],
    },
    entry_points={
        "console_scripts": ["nemo-rmt = nemo_rmt.cli:main"],
        "nemo_run.cli": ["rmt = nemo_rmt.adapters.nemo_run_cli"],
    },
)
