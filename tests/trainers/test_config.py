"""Settings: all mistakes are reported at once."""

import pytest
from pydantic import ValidationError

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import TrainConfig, load_config
from orbithash.trainers.methods.dhcl import DhclConfig
from orbithash.trainers.methods.duch import DuchConfig


def yaml_file(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def message_of(*arguments, **given):
    with pytest.raises(InputError) as caught:
        load_config(*arguments, **given)
    return str(caught.value)


def test_defaults():
    config = load_config(DhclConfig)
    assert (config.bits, config.backbone, config.norm, config.weights) == (64, "mobilenet_v2", "group", None)


def test_file_then_settings_then_keyword_values(tmp_path):
    file = yaml_file(tmp_path, "bits: 16\nepochs: 3\nseed: 5\nlr: 0.01\n")
    config = load_config(DhclConfig, file, ["epochs=4", "seed=6"], seed=7)
    assert (config.bits, config.epochs, config.seed, config.lr) == (16, 4, 7, 0.01)


def test_a_keyword_value_of_none_is_not_given(tmp_path):
    assert load_config(DhclConfig, yaml_file(tmp_path, "bits: 16"), bits=None).bits == 16


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_numbers_as_people_write_them(tmp_path, text):
    assert load_config(DhclConfig, yaml_file(tmp_path, f"lr: {text}")).lr == 1e-4
    assert load_config(DhclConfig, None, [f"lr={text}"]).lr == 1e-4


def test_settings_are_yaml():
    config = load_config(DhclConfig, None, ["weights=null", "count_label_bits=true", "label_code=gray", "bits=48"])
    assert (config.weights, config.count_label_bits, config.label_code, config.bits) == (None, True, "gray", 48)
    assert load_config(DhclConfig, None, ["label_code=none"]).label_code == "none"
    assert load_config(DhclConfig, None, ["weights=a=b.safetensors"]).weights == "a=b.safetensors"


def test_a_path_that_exists_becomes_absolute_and_a_name_stays(tmp_path, monkeypatch):
    """Workers read the settings in another current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    (tmp_path / "own.safetensors").touch()
    config = load_config(DuchConfig, None, ["weights=own.safetensors", "text_encoder=models/minilm"])
    assert (config.weights, config.text_encoder) == (f"{tmp_path}/own.safetensors", f"{tmp_path}/models/minilm")
    config = load_config(DuchConfig, None, ["weights=IMAGENET1K_V2", "text_encoder=sentence-transformers/minilm"])
    assert (config.weights, config.text_encoder) == ("IMAGENET1K_V2", "sentence-transformers/minilm")
    # Longer than the longest file name.
    assert load_config(DuchConfig, weights="w" * 5000).weights == "w" * 5000
    assert load_config(DuchConfig, weights="").weights == ""


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_holds_no_settings(tmp_path, text):
    assert load_config(DhclConfig, yaml_file(tmp_path, text)) == DhclConfig()


def test_norm_follows_the_weights():
    assert load_config(DhclConfig).norm == "group"
    assert load_config(DhclConfig, weights="DEFAULT").norm == "frozen-batch"
    assert load_config(DhclConfig, norm="frozen-batch").norm == "frozen-batch"
    assert "norm is group, but pretrained weights need batch norm" in message_of(
        DhclConfig, weights="DEFAULT", norm="group"
    )


def test_a_resolved_config_resolves_to_itself():
    config = load_config(DhclConfig, weights="DEFAULT", bits=48)
    assert load_config(DhclConfig, **config.model_dump()) == config


@pytest.mark.parametrize("bits", [0, 7, 513, 1000, -8, 16.5, "many"])
def test_bits_out_of_range(bits):
    assert f"bits is {bits!r}" in message_of(DhclConfig, bits=bits)


@pytest.mark.parametrize("bits", [8, 9, 512, 16.0])
def test_bits_in_range(bits):
    assert load_config(DhclConfig, bits=bits).bits == bits


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 1),
        ("batch_size", "all"),
        ("seed", -1),
        ("seed", 2**31),
        ("image_size", 31),
        ("image_size", [32, 32]),
        ("norm", "instance"),
        ("weights", 5),
        ("backbone", "vgg"),
        ("backbone", 18),
        ("margin", 0),
        ("margin", float("nan")),
        ("scale", float("inf")),
        ("lr", "fast"),
        ("lr", 0),
        ("label_code", "grey"),
        ("count_label_bits", 3),
        ("quantisation_weight", float("nan")),
        ("classification_weight", float("inf")),
    ],
)
def test_a_wrong_value_is_named_in_one_line(key, value):
    message = message_of(DhclConfig, **{key: value})
    assert message.startswith(f"settings: {key} is {value!r}: ")
    assert "\n" not in message


def test_the_allowed_values_are_named():
    assert "mobilenet_v2, " in message_of(DhclConfig, backbone="vgg")
    assert "'none', 'binary', 'gray', 'one-hot' or 'error-correcting'" in message_of(DhclConfig, label_code="grey")
    assert "greater than or equal to 8" in message_of(DhclConfig, bits=7)


@pytest.mark.parametrize(
    ("key", "near"), [("epoch", "epochs"), ("batchsize", "batch_size"), ("lr_decay_epoch", "lr_decay_epochs")]
)
def test_a_misspelt_key_meets_a_suggestion(key, near):
    assert message_of(DhclConfig, None, [f"{key}=1"]) == f"settings: unknown key {key!r}; did you mean {near}?"


def test_a_key_like_no_other_meets_the_list():
    message = message_of(DhclConfig, None, ["xyzzy=1"])
    assert all(name in message for name in DhclConfig.model_fields)


def test_a_method_adds_to_the_common_settings():
    assert "unknown key 'margin'" in message_of(TrainConfig, margin=0.2)


def test_everything_at_once(tmp_path):
    file = yaml_file(tmp_path, "bits: 7\nbackbone: vgg\nepoch: 3\n1: 2\nlr: fast\n")
    message = message_of(DhclConfig, file, ["batchsize=4", "no equals", "=5", "norm=[", "scale=1000"], margin=3)
    assert message.startswith("settings: found 11 problems:\n")
    for part in (
        "bits is 7: ",
        "backbone is 'vgg': ",
        "unknown key 'epoch'",
        "unknown key 1;",
        "lr is 'fast': ",
        "unknown key 'batchsize'",
        "'no equals' is not of the form key=value",
        "'=5' is not of the form key=value",
        "norm: '[' is not a YAML value",
        "scale is 1000: ",
        "margin is 3: ",
    ):
        assert part in message, part


@pytest.mark.parametrize("text", ["bits: [", "bits: 8\n\tlr: 1", "? {a: b}\n: 1", "\x00"])
def test_a_file_that_is_no_yaml(tmp_path, text):
    assert message_of(DhclConfig, yaml_file(tmp_path, text)).endswith("config.yaml: not a YAML file")


def test_a_file_of_other_bytes_than_text(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x80")
    assert "not a YAML file" in message_of(DhclConfig, tmp_path / "config.yaml")


@pytest.mark.parametrize(("text", "kind"), [("- bits\n- 8\n", "list"), ("bits\n", "str"), ("8\n", "int")])
def test_a_file_without_keys(tmp_path, text, kind):
    assert f"contains keys and values, got {kind}" in message_of(DhclConfig, yaml_file(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    assert "the config file cannot be read (No such file" in message_of(DhclConfig, tmp_path / "absent.yaml")
    assert "the config file cannot be read (Is a directory" in message_of(DhclConfig, tmp_path)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        load_config(DhclConfig).bits = 8


def test_alexnet_needs_more_pixels_than_the_others():
    assert "image_size is 62: alexnet needs at least 63" in message_of(DhclConfig, backbone="alexnet", image_size=62)
    assert "encoding_sizes is 62: alexnet needs" in message_of(DhclConfig, backbone="alexnet", encoding_sizes=[62])
    assert load_config(DhclConfig, backbone="alexnet", image_size=63).image_size == 63


@pytest.mark.parametrize(
    ("settings", "num_classes", "hash_bits"),
    [
        ({"bits": 16}, 21, 16),
        ({"bits": 16, "label_code": "binary"}, 21, 16),
        ({"bits": 16, "label_code": "binary", "count_label_bits": True}, 21, 11),
        ({"bits": 16, "label_code": "gray", "count_label_bits": True, "label_weight": 2}, 16, 8),
        ({"bits": 32, "label_code": "one-hot", "count_label_bits": True}, 21, 11),
        ({"bits": 512, "label_code": "none", "count_label_bits": True}, 21, 512),
        ({"bits": 507, "label_code": "binary"}, 21, 507),
    ],
)
def test_hash_bits_are_what_the_label_bits_leave(settings, num_classes, hash_bits):
    assert load_config(DhclConfig, **settings).hash_bits(num_classes) == hash_bits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 12, "label_code": "binary", "count_label_bits": True}, "5 label bits leaves 7 hash bits"),
        ({"bits": 16, "label_code": "one-hot", "count_label_bits": True}, "leaves -5 hash bits"),
        ({"bits": 508, "label_code": "binary"}, "in a code of 513; .* at most 512"),
    ],
)
def test_label_bits_that_leave_too_little(settings, message):
    with pytest.raises(InputError, match=message):
        load_config(DhclConfig, **settings).hash_bits(21)
