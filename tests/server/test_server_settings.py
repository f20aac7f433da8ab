"""Settings come from options, else from the environment, else from documented defaults."""

import pytest

from fullframe.errors import InvalidInput
from fullframe.settings import PREFIX, Settings, describe, read_settings


def test_every_setting_has_a_doc_line() -> None:
    for name in Settings.model_fields:
        assert len(describe(name)) > 10


def test_options_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "PORT", "7001")
    monkeypatch.setenv(PREFIX + "HOST", "0.0.0.0")
    settings = read_settings(port=7002, host=None)
    assert (settings.port, settings.host, settings.metrics_port) == (7002, "0.0.0.0", 8002)


def test_units_and_lists_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "MAX_IMAGE_BYTES", "2MiB")
    monkeypatch.setenv(PREFIX + "MODELS", "a=x.onnx,b=y.onnx")
    settings = read_settings()
    assert settings.max_image_bytes == 2 * 2**20
    assert settings.models == ("a=x.onnx", "b=y.onnx")
    assert read_settings(models=["c.onnx"]).models == ("c.onnx",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000),
        ("grace", -1),
        ("log_level", "loud"),
        ("max_message_bytes", 2**31),
        ("max_message_bytes", 2**17 - 1),
        ("max_image_bytes", 2**17 - 1),
        ("prot", 1),
    ],
)
def test_what_cannot_be_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_settings(**{name: value})
    assert caught.value.field == name
    assert "Input should" not in str(caught.value) and "Value error" not in str(caught.value)
    assert name in str(caught.value) and PREFIX + name.upper() in str(caught.value) and repr(value) in str(caught.value)


def test_an_upload_larger_than_the_room_for_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "MAX_SPOOL_BYTES", "1MiB")
    assert read_settings().max_spool_bytes == read_settings(max_upload_bytes="1MiB").max_upload_bytes == 2**20
    with pytest.raises(InvalidInput, match="'max_upload_bytes' is 2097152, more than 'max_spool_bytes', 1048576") as it:
        read_settings(max_upload_bytes="2MiB")
    assert it.value.field == "max_upload_bytes"
