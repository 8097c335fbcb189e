"""What `setup.cfg` cannot say: files that are no modules, and recipes and configs inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["trl_ext*"]), "trl_ext.recipes", "trl_ext.accelerate_configs"],
    package_dir={"trl_ext.recipes": "recipes", "trl_ext.accelerate_configs": "accelerate_configs"},
    package_data={
        "trl_ext.cli": ["options.json"],
        "trl_ext.comparison": ["*.j2"],
        "trl_ext.recipes": ["*.md", "configs/*.yaml", "slurm/*"],
        "trl_ext.accelerate_configs": ["*"],
    },
)
