import json
import re
from pathlib import Path

import pytest

from moe_server.config import Config, known_keys, load_config, parse_bytes
from moe_server.errors import MoeServerError, Reason


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('listen = "a:1"\nmodel_name = "file"\nmax_total_tokens = 7\nthreads = 2\n')
    environ = {
        "MOE_SERVER_MODEL_NAME": "environ",
        "MOE_SERVER_MAX_TOTAL_TOKENS": "8",
        "MOE_SERVER_WARMUP__MAX_TTFT_MS": "12.5",
        "HOME": "/",
    }
    config = load_config(file, {"max_total_tokens": "9", "warmup.probes": 2}, environ)
    assert config.listen == "a:1"
    assert config.model_name == "environ"
    assert config.max_total_tokens == 9
    assert config.threads == 2
    assert (config.warmup.max_ttft_ms, config.warmup.probes) == (12.5, 2)
    assert config.device == Config().device


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".toml", "[warmup]\nbatch = 3\n"),
        (".yaml", "warmup:\n  batch: 3\n"),
        (".yml", "warmup: {batch: 3}\n"),
        (".json", '{"warmup": {"batch": 3}}'),
    ],
)
def test_kinds_of_files(tmp_path, suffix, text):
    file = tmp_path / f"config{suffix}"
    file.write_text(text)
    assert load_config(file, environ={}).warmup.batch == 3


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("device_memroy", "device_memory"),
        ("warmup.max_ttft", "warmup.max_ttft_ms"),
        ("scheduler.max_runing", "scheduler.max_running"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(MoeServerError) as caught:
        load_config(flags={key: "1"}, environ={})
    assert key in caught.value.message
    assert nearest in caught.value.remedy
    assert caught.value.field == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "tpu"),
        ("device_memory", "24 parsecs"),
        ("device_memory", "-1"),
        ("host_memory", "min"),
        ("device_memory", "1e19"),
        ("host_memory", "2000000TiB"),
        ("max_total_tokens", "1"),
        ("model", ""),
        ("listen", "127.0.0.1:99999"),
        ("listen", ""),
        ("admin_listen", "nonsense"),
        ("zero3_config", "/nope.json"),
        ("warmup", "5"),
        ("warmup.max_ttft_ms", "-5"),
        ("service.shutdown_grace_s", "soon"),
    ],
)
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(MoeServerError) as caught:
        load_config(flags={key: value}, environ={})
    assert caught.value.field == key
    assert key in caught.value.message
    assert "Value error" not in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("host_memory", "5G", "GB, TB (powers of 1000), KiB, MiB, GiB"),
        ("scheduler", "5", "scheduler = '5' is not usable: expected a table of keys."),
        ("model", "", 'a directory, or "demo"'),
        ("admin_listen", "localhost:abc", "the port is 'abc'"),
    ],
)
def test_what_messages_say(key, value, says):
    with pytest.raises(MoeServerError) as caught:
        load_config(flags={key: value}, environ={})
    assert says in caught.value.message


def test_a_deepspeed_file_must_hold_a_json_object(tmp_path):
    file = tmp_path / "zero.json"
    for text, says in (("{", "no JSON"), ("[]", "list"), ("\xff", "no JSON")):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(MoeServerError, match=says) as caught:
            load_config(flags={"zero3_config": str(file)}, environ={})
        assert caught.value.field == "zero3_config"
    file.write_text("{}")
    assert load_config(flags={"zero3_config": str(file)}, environ={}).zero3_config == file


def test_the_environment_of_a_kubernetes_pod():
    links = {
        "MOE_SERVER_PORT": "tcp://10.0.0.1:50051",
        "MOE_SERVER_PORT_50051_TCP_ADDR": "10.0.0.1",
        "MOE_SERVER_SERVICE_HOST": "10.0.0.1",
        "MOE_SERVER_SERVICE_PORT": "50051",
        "MOE_SERVER_SERVICE_PORT_GRPC": "50051",
    }
    assert load_config(environ=links) == Config()
    for name in ("MOE_SERVER_SERVICE_NAME", "MOE_SERVER_PORTS", "MOE_SERVER_LISTENS"):
        with pytest.raises(MoeServerError, match="Unknown configuration key"):
            load_config(environ={name: "1"})


def test_an_empty_variable_is_an_unset_one():
    assert load_config(environ={"MOE_SERVER_DEVICE_MEMORY": "", "MOE_SERVER_X": ""}) == Config()


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_yaml_file_sets_nothing(tmp_path, text):
    file = tmp_path / "server.yaml"
    file.write_text(text)
    assert load_config(file, environ={}) == Config()


def test_a_key_like_none_of_ours_names_the_list_of_all():
    with pytest.raises(MoeServerError, match="check-config --help") as caught:
        load_config(flags={"quantisation": "4"}, environ={})
    assert "Did you mean" not in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("512mb", 512_000_000),
        ("1_000", 1000),
        ("7", 7),
        ("min", "min"),
        (" MIN", "min"),
        (5, 5),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


def test_unreadable_files(tmp_path):
    with pytest.raises(MoeServerError) as caught:
        load_config(tmp_path / "absent.toml", environ={})
    assert caught.value.reason is Reason.NOT_FOUND
    assert "--config" in caught.value.remedy
    for name, text in (("a.toml", "x ="), ("b.json", "[1]"), ("c.ini", "")):
        file = tmp_path / name
        file.write_text(text)
        with pytest.raises(MoeServerError, match=name):
            load_config(file, environ={})


def test_a_config_survives_the_way_to_the_engine():
    config = load_config(flags={"device_memory": "min", "warmup.batch": 2}, environ={})
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_every_key_is_documented():
    documented = json.dumps(Config.model_json_schema())
    assert documented.count('"description"') >= len(known_keys()) - 3
    assert "warmup.max_ttft_ms" in known_keys()


def test_names_of_the_served_model(tmp_path):
    assert load_config(environ={}).served_name == "demo"
    assert Config(model=str(tmp_path)).served_name == tmp_path.name
    assert Config(model=str(tmp_path), model_name="x").served_name == "x"


def test_keys_that_are_no_text_are_unknown_keys(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("warmup: {1: 2}\n")
    with pytest.raises(MoeServerError, match=r"warmup\.1"):
        load_config(file, environ={})


HEAVY_AND_LIGHT = """
model_name = "heavy"
device_memory = "24GiB"
listen = "127.0.0.1:7"
[scheduler]
max_running = 3
[[models]]
model = "demo"
model-name = "light"
device_memory = "1GiB"
warmup = {probes = 7}
"""


def heavy_and_light(tmp_path, **replacements):
    text = HEAVY_AND_LIGHT
    for old, new in replacements.values():
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / "server.toml"
    file.write_text(text)
    return load_config(file, environ={"MOE_SERVER_THREADS": "2"})


def test_further_models_have_keys_of_their_own(tmp_path):
    config = heavy_and_light(tmp_path)
    heavy, light = config.all_models
    assert (heavy.served_name, light.served_name) == ("heavy", "light")
    assert (heavy.device_memory, light.device_memory) == (24 * 2**30, 2**30)
    assert (heavy.scheduler.max_running, light.scheduler.max_running) == (3, 32)
    assert (heavy.warmup.probes, light.warmup.probes) == (3, 7)
    # Flags and environment are those of the first.
    assert (heavy.threads, light.threads) == (2, None)
    assert "listen" not in type(light).model_fields
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert len(Config().all_models) == 1


@pytest.mark.parametrize(
    ("new", "key", "says"),
    [
        ("device_memroy = 1", "models[0].device_memroy", "Did you mean 'models[0].device_memory'?"),
        ("warmup.probs = 1", "models[0].warmup.probs", "'models[0].warmup.probes'"),
        ('listen = "a:1"', "models[0].listen", "set listen outside of models"),
        ('device = "tpu"', "models[0].device", "models[0].device = 'tpu' is not usable"),
        ("warmup.probes = 0", "models[0].warmup.probes", "models[0].warmup.probes = 0 is not"),
        ('zero3_config = "/nope.json"', "models[0].zero3_config", "models[0].zero3_config = '/n"),
    ],
)
def test_what_is_wrong_in_a_further_model_is_named_by_its_path(tmp_path, new, key, says):
    without = ("warmup = {probes = 7}", new)
    with pytest.raises(MoeServerError) as caught:
        heavy_and_light(tmp_path, key=without)
    assert caught.value.field == key
    assert says in str(caught.value)


def test_names_must_differ(tmp_path):
    with pytest.raises(MoeServerError, match="Two models are called 'heavy'") as caught:
        heavy_and_light(tmp_path, name=('"light"', '"heavy"'))
    assert caught.value.field == "models[0].model_name"


def test_a_further_model_must_say_where_it_is(tmp_path):
    with pytest.raises(MoeServerError, match=r"models\[0\]\.model is missing") as caught:
        heavy_and_light(tmp_path, model=('model = "demo"', ""))
    assert caught.value.field == "models[0].model"


@pytest.mark.parametrize(
    ("given", "key"), [("models = 5", "models"), ("models = [5]", "models[0]")]
)
def test_models_are_a_list_of_tables(tmp_path, given, key):
    file = tmp_path / "server.toml"
    file.write_text(given)
    with pytest.raises(MoeServerError, match=r"expected a (list|table) of") as caught:
        load_config(file, environ={})
    assert caught.value.field == key
    with pytest.raises(MoeServerError, match="in the file given by --config"):
        load_config(environ={"MOE_SERVER_MODELS": "[]"})


def test_the_examples_in_the_documentation_are_configurations(tmp_path):
    root = Path(__file__).parents[1]
    num_models = []
    for page in (root / "README.md", root / "docs" / "several-models.md"):
        [text] = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        file = tmp_path / "example.toml"
        file.write_text(text)
        num_models.append(len(load_config(file, environ={}).all_models))
    assert num_models == [2, 2]


def test_two_models_do_not_write_the_same_hot_set(tmp_path):
    file = tmp_path / "server.toml"
    text = '[warmup]\nhot_set = "a"\n[[models]]\nmodel = "demo"\nmodel_name = "x"\n'
    file.write_text(f'{text}warmup = {{hot_set = "a"}}\n')
    with pytest.raises(MoeServerError, match="overwrite the other's") as caught:
        load_config(file, environ={})
    assert caught.value.field == "models[0].warmup.hot_set"
    for other in ("b", "auto", "off"):
        file.write_text(f'{text}warmup = {{hot_set = "{other}"}}\n')
        assert load_config(file, environ={}).models[0].warmup.hot_set == other


def test_a_hot_set_is_a_path_or_a_word():
    with pytest.raises(MoeServerError, match=r"warmup\.hot_set = ''") as caught:
        load_config(flags={"warmup.hot_set": ""}, environ={})
    assert "off" in str(caught.value)
