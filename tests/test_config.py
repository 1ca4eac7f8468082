import json
from pathlib import Path
from typing import Any

import pytest

from api import config, model_source
from api.config import ROOT, ModelSource, Settings, load_settings, locate
from api.errors import SettingsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(Settings.model_config, "env_file", tmp_path / ".env")
    for module in (config, model_source):
        monkeypatch.setattr(module, "ROOT", tmp_path)


@pytest.fixture
def dotenv(tmp_path: Path) -> Path:
    return tmp_path / ".env"


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    return tmp_path / "sitter.yaml"


def refused() -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return str(caught.value)


def test_the_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.use_gpu) == ("127.0.0.1", 8000, True)
    assert settings.output_dir == ROOT / "api" / "output"
    assert set(settings.user_models) == {"default", "ada", "bo", "chi"}


@pytest.mark.parametrize("proxies", ["127.0.0.1", "10.0.0.7, 172.16.0.0/12,fd00::/8"])
def test_proxies_are_addresses_and_networks(proxies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUSTED_PROXIES", proxies)
    assert load_settings().trusted_proxies == proxies


@pytest.mark.parametrize("proxies", ["*", "caddy", "127.0.0.1, caddy", "10.0.0.7/8", "10.0.0.0/33"])
def test_a_proxy_that_is_none_stops_the_start(proxies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUSTED_PROXIES", proxies)
    assert "TRUSTED_PROXIES" in refused()


@pytest.mark.parametrize("name", ["JUDGE_ENCODER", "FACE_DETECTOR"])
def test_a_folder_without_a_model_stops_the_start(
    name: str, tmp_path: Path, dotenv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert getattr(load_settings(), name.lower()) is None
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty", str(tmp_path / "nowhere")):
        monkeypatch.setenv(name, folder)
        said = f"{name}: {locate(folder)} is no folder with a model: it has no config.json (from the environment)"
        assert refused() == said
    monkeypatch.delenv(name)
    (tmp_path / "empty/config.json").write_text("{}")
    dotenv.write_text(f"{name}=empty\n")
    assert getattr(load_settings(), name.lower()) == tmp_path / "empty"


def test_where_each_setting_was_read(dotenv: Path, yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dotenv.write_text("PORT=1\nWORKERS=2\nLOG_LEVEL=debug\n")
    yaml.write_text("port: 3\nauth: required\n")
    monkeypatch.setenv("WORKERS", "4")
    settings = load_settings(log_level="error")
    assert (settings.port, settings.workers, settings.auth, settings.log_level) == (1, 4, "required", "error")
    assert settings.origins == {
        "PORT": ".env",
        "WORKERS": "the environment",
        "AUTH": "sitter.yaml",
        "LOG_LEVEL": "the command",
    }


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]


def test_sources_weigh_arguments_environment_dotenv_yaml(
    dotenv: Path, yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml.write_text("host: yaml\nport: 1\nlog_level: debug\ncpu_threads: 1\n")
    dotenv.write_text("HOST=dotenv\nPORT=2\nLOG_LEVEL=error\n")
    monkeypatch.setenv("HOST", "environment")
    monkeypatch.setenv("PORT", "3")
    settings = load_settings(host="argument")
    assert (settings.host, settings.port, settings.log_level, settings.cpu_threads) == ("argument", 3, "error", 1)


def test_sitter_config_names_the_yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.yaml").write_text("port: 9\n")
    monkeypatch.setenv("SITTER_CONFIG", str(tmp_path / "other.yaml"))
    assert load_settings().port == 9
    monkeypatch.setenv("SITTER_CONFIG", str(tmp_path / "nothing.yaml"))
    assert "nothing.yaml, which is not a file" in refused()


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "")
    assert load_settings().port == 8000


@pytest.mark.parametrize("name", ["PROT", "SITTER_PORT"])
def test_an_unknown_setting_in_dotenv_stops_the_start(dotenv: Path, name: str) -> None:
    dotenv.write_text(f"{name}=1\n")
    assert refused() == f"unknown setting {name} in .env; did you mean PORT?"


def test_an_unknown_setting_in_yaml_stops_the_start(yaml: Path) -> None:
    yaml.write_text("prot: 1\n")
    assert refused() == "unknown setting prot in sitter.yaml; did you mean PORT?"
    yaml.write_text("zebra: 1\n")
    assert refused() == "unknown setting zebra in sitter.yaml"


def test_an_unknown_field_of_a_model_stops_the_start(yaml: Path) -> None:
    yaml.write_text("user_models: {Ada: {base: a, scale: 1}}")
    assert refused() == "unknown setting USER_MODELS.Ada.scale in sitter.yaml; did you mean lora_scale?"


def test_a_setting_in_yaml_may_be_written_in_capitals(yaml: Path) -> None:
    yaml.write_text("PORT: 9\nUser_Models: {Ada: {base: mine}}\n")
    settings = load_settings()
    assert (settings.port, settings.user_models["Ada"].base) == (9, "mine")


@pytest.mark.parametrize("content", ["{", "- port\n", "just words\n", "port: [\n", "\x00", "\tport: 1", "1: 2"])
def test_a_broken_yaml_file_stops_the_start(yaml: Path, content: str) -> None:
    yaml.write_text(content)
    assert "sitter.yaml" in refused()


@pytest.mark.parametrize(
    ("name", "meant"), [("SITTER_PORT", "; did you mean PORT?"), ("SITTER_", ""), ("SITTER_CONFIGURATION", "")]
)
def test_a_variable_with_our_name_that_nobody_knows_stops_the_start(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    assert refused() == f"unknown setting {name} in the environment{meant}"


def test_a_bad_value_is_told_with_its_source(
    tmp_path: Path, dotenv: Path, yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml.write_text("port: x\n")
    assert refused().endswith("(from sitter.yaml)")
    (tmp_path / "other.yaml").write_text("port: x\n")
    monkeypatch.setenv("SITTER_CONFIG", str(tmp_path / "other.yaml"))
    assert refused().endswith("(from other.yaml)")
    dotenv.write_text("PORT=y\n")
    assert refused().endswith("(from .env)")
    monkeypatch.setenv("PORT", "z")
    assert refused().endswith("(from the environment)")
    assert refused().startswith("PORT: ")


def test_a_bad_model_is_told_with_its_user_and_source(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml.write_text("user_models: {Ada: {base: ''}, bo: mine}")
    monkeypatch.setenv("USER_MODELS", '{"eve": "a"}')
    assert refused().startswith("USER_MODELS.Ada.base: ")
    assert refused().endswith("(from sitter.yaml)")
    monkeypatch.setenv("USER_MODELS", '{"Ada": {"lora": "a"}}')
    assert refused() == "USER_MODELS.Ada.base: Field required (from the environment)"


def test_a_bad_model_in_the_code_has_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.USER_MODELS, "Ada", {"lora": "a"})
    assert refused() == "USER_MODELS.Ada.base: Field required"


def test_models_that_are_no_json_are_told_with_their_source(dotenv: Path) -> None:
    dotenv.write_text("USER_MODELS={broken\n")
    assert refused().startswith("USER_MODELS: this is not JSON: ")
    assert refused().endswith("(from .env)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("PORT", "http"),
        ("USE_GPU", "perhaps"),
        ("DTYPE", "int8"),
        ("CPU_THREADS", "-1"),
        ("HOST_CACHE_GB", "nan"),
        ("HOST_CACHE_GB", "-1"),
        ("GPU_CACHE_GB", "inf"),
        ("MAX_QUEUED", "0"),
        ("HUB_TIMEOUT_SECONDS", "0"),
        ("LOG_LEVEL", "loud"),
        ("USER_MODELS", '{"a": 1}'),
        ("USER_MODELS", '["a"]'),
        ("USER_MODELS", "not json"),
    ],
)
def test_a_value_that_does_not_fit_stops_the_start(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert name in refused().upper()


def test_a_secret_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    settings = load_settings()
    assert "hf_secret" not in repr(settings) + str(settings.model_dump())
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_secret"


def test_models_of_every_source_are_added(dotenv: Path, yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml.write_text("user_models:\n  from_yaml: a/b\n  ada: mine\n")
    dotenv.write_text('USER_MODELS={"from_dotenv": "c/d"}\n')
    monkeypatch.setenv("USER_MODELS", '{"from_environment": {"base": "e/f", "lora": "g", "lora_scale": 0.5}}')
    models = load_settings().user_models
    assert set(models) == {"default", "ada", "bo", "chi", "from_yaml", "from_dotenv", "from_environment"}
    assert models["ada"] == ModelSource(base="mine")
    assert models["from_environment"] == ModelSource(base="e/f", lora="g", lora_scale=0.5)


def test_a_configuration_without_a_default_model_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "USER_MODELS", {"ada": "models/demo"})
    with pytest.raises(SettingsError, match=r'USER_MODELS: .*"default"'):
        load_settings()


def test_a_model_is_never_put_together_from_two_sources(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml.write_text("user_models: {eve: {base: models/demo, lora: models/sitters/ada, lora_scale: 0.5}, bo: other}")
    monkeypatch.setenv("USER_MODELS", '{"eve": {"base": "/srv/eve"}}')
    models = load_settings().user_models
    assert models["eve"] == ModelSource(base="/srv/eve")
    assert models["bo"] == ModelSource(base="other")


def test_a_log_level_in_capitals_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "INFO")
    assert load_settings().log_level == "info"


def test_a_user_without_a_model_gets_the_default() -> None:
    settings = load_settings(user_models={"eve": "eve/model"})
    assert settings.source_for("eve").model_id == "eve/model"
    assert settings.source_for("nobody") == settings.user_models["default"]


@pytest.mark.parametrize("user", ["a", "_", "user_123", "a@b.example", "A-1", "x" * 64])
def test_a_reasonable_user_id_is_taken(user: str) -> None:
    assert user in load_settings(user_models={user: "a"}).user_models


BAD_USERS = ["", "../a", "a/b", "a\\b", "a\0", "a b", ".hidden", "-a", "@a", "x" * 65, "ä", "a\n", "a\u202eb", "१"]


@pytest.mark.parametrize("user", BAD_USERS, ids=ascii)
def test_an_odd_user_id_is_refused(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER_MODELS", json.dumps({user: "a"}))
    assert "a user id has letters" in refused()


@pytest.mark.parametrize(
    "fields",
    [
        {"base": ""},
        {"base": "a", "lora": ""},
        {"base": "a", "config": ""},
        {"base": "a", "lora_scale": 2.1},
        {"base": "a", "lora_scale": -2.1},
        {"base": "a", "lora_scale": float("nan")},
        {"base": "a", "scale": 1},
        {"lora": "a"},
        {},
    ],
    ids=str,
)
def test_an_odd_model_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        load_settings(user_models={"a": fields})


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("Zhurah/sd15-dreambooth-photoai", ("Zhurah/sd15-dreambooth-photoai", None)),
        (f"some.body/model_1@{COMMIT}", ("some.body/model_1", COMMIT)),
        ("a/b@main", ("a/b", "main")),
        ("a/b@", ("a/b", None)),
        ("a/b/c", None),
        ("a", None),
        ("/a/b", None),
        ("./a", None),
        ("../a", None),
        ("a/../b", None),
        ("a/", None),
        ("~/a", None),
        ("a/b.safetensors", None),
        ("a b/c", None),
        ("a/b\n", None),
    ],
)
def test_hub_ids_are_told_from_paths(base: str, expected: tuple[str, str | None] | None) -> None:
    assert ModelSource(base=base).hub_id == expected


def test_a_slip_in_a_path_of_the_checkout_is_no_hub_id(tmp_path: Path) -> None:
    source = ModelSource(base="models/demmo")
    assert source.hub_id == ("models/demmo", None)
    (tmp_path / "models").mkdir()
    assert source.hub_id is None


def test_a_folder_that_is_there_is_no_hub_id(tmp_path: Path) -> None:
    source = ModelSource(base="models/mine")
    assert source.hub_id == ("models/mine", None)
    (tmp_path / "models/mine").mkdir(parents=True)
    assert source.hub_id is None


def test_the_name_of_a_model_is_its_adapter_or_its_base() -> None:
    assert ModelSource(base="base").model_id == "base"
    assert ModelSource(base="base", lora="lora").model_id == "lora"


def test_relative_paths_start_at_the_checkout(tmp_path: Path) -> None:
    assert locate("models/demo") == tmp_path / "models/demo"
    assert locate("/srv/models") == Path("/srv/models")
    assert locate("~/models") == Path.home() / "models"
