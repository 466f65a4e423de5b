"""Shipped configurations of accelerate, as its own launcher reads them; and what is refused of others."""

import os

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from ebft.cli import main
from ebft.cli.arguments import parse
from ebft.cli.engines import CONFIGS, SHIPPED, config_path, engine_of
from ebft.engine_checks import check_engine
from training import config

KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.fixture
def launched(monkeypatch):
    """The environment that `accelerate launch` gives its processes, for a configuration and two GPUs."""
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def environment(name: str) -> dict[str, str]:
        words = ["--config_file", str(config_path(name)), "--num_processes", "2", "-m", "ebft", "train"]
        args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as `launch_command` does
        return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)

    return environment


def test_all_are_named():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SHIPPED) == set(KINDS)
    assert all(engine_of(name) == name for name in SHIPPED) and engine_of(None) == "ddp"


@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_reads_it(name, launched):
    assert load_config_from_file(str(config_path(name))).distributed_type == DistributedType[KINDS[name]]
    environment = launched(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == {"zero2": "2", "zero3": "3"}.get(name)


def test_fsdp2_is_what_rollouts_need(launched, tmp_path, monkeypatch):
    os.environ.update(launched("fsdp2"))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and not plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    args = config(tmp_path)
    with pytest.raises(ValueError, match="fsdp on a CPU: .* leave it out"):
        check_engine(args)
    check_engine(on_gpu(args, monkeypatch))


def on_gpu(args, monkeypatch):
    monkeypatch.setattr(type(args), "device", type("Device", (), {"type": "cuda"}))
    return args


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version=1: .* set fsdp_version: 2"),
        ({}, "fsdp_version=1: .* set fsdp_version: 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy=SIZE_BASED_WRAP .* TRANSFORMER_BASED"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading=true .* set it to false"),
    ],
)
def test_other_ways_are_refused(environment, message, tmp_path, monkeypatch):
    args = on_gpu(config(tmp_path), monkeypatch)
    version = {"FSDP_VERSION": "2"} if environment else {}
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | version | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_engine(args)


def test_a_moving_average_and_zero_3_are_refused(tmp_path, monkeypatch):
    args = on_gpu(config(tmp_path, feature_network="ema"), monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="feature_network='ema' needs the policy's whole weights"):
        check_engine(args)
    args.deepspeed_plugin = type("Plugin", (), {"zero_stage": 3})
    with pytest.raises(ValueError, match=r"zero_stage=3 .* use FSDP2"):
        check_engine(args)


def test_fsdp_as_an_option_of_the_run(tmp_path):
    """As docs/scaling.md has it for torchrun, and as resolved_config.yaml writes it."""
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu"]
    sharded = '{"state_dict_type": "SHARDED_STATE_DICT"}'
    (tmp_path / "fsdp.yaml").write_text(f"fsdp: true\nfsdp_config: {sharded}\n")
    for more in (["--fsdp", "true", "--fsdp_config", sharded], ["--config", str(tmp_path / "fsdp.yaml")]):
        training = parse([*words, *more]).training
        assert training.fsdp is True and training.fsdp_plugin_args["state_dict_type"] == "SHARDED_STATE_DICT"
    assert not parse([*words, "--fsdp", "false"]).training.fsdp


def test_a_file_of_ones_own(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}))
    assert engine_of(str(mine)) == "fsdp2"
    words = ["train", "--model_name_or_path", "m", "--dataset_name", "d", "--accelerate_config"]
    assert main([*words, "fsdp3"]) == 2
    assert "accelerate_config: got 'fsdp3'; give one of ddp, fsdp2" in capsys.readouterr().err
    mine.write_text("distributed_type: MEGATRON_LM")
    assert main([*words, str(mine)]) == 2
    assert "has distributed_type: MEGATRON_LM" in capsys.readouterr().err
    mine.write_text("a name alone")
    assert main([*words, str(mine)]) == 2
    assert "has distributed_type: None" in capsys.readouterr().err
    mine.write_text("token: [hf_secret\n")
    assert main([*words, str(mine)]) == 2
    said = capsys.readouterr().err
    assert "mine.yaml:2: not valid YAML" in said and "hf_secret" not in said
    mine.write_text("distributed_type: FSDP\nfsdp_config:\n")
    assert engine_of(str(mine)) == "fsdp1"
