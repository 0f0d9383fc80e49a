"""Configuration: precedence, suggestions, what counts as a change."""

import pytest

from tarsift.operators.errors import ChangedError, ConfigError
from tarsift.pipelines.config import CleanConfig, all_settings, differences, load_config, refuse_changes


def test_precedence_is_file_then_flags_then_set(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("flag: {value: 0.1, policy: fraction}\nresources: {threads: 2}\n")
    assert load_config(str(file)).flag.value == 0.1
    assert load_config(str(file), flag__value=0.2).flag.value == 0.2
    config = load_config(str(file), ["flag.value=0.3"], flag__value=0.2)
    assert (config.flag.value, config.resources.threads) == (0.3, 2)


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("flag.vallue=1", r"did you mean flag\.value"),
        ("suspicion.purge_fractoin=.1", r"did you mean suspicion\.purge_fraction"),
        ("flag.value=2", "a fraction is from 0 to below 1, got 2"),
        ("flag.policy=best", "fraction"),
        ("resources.threads=0", r"resources\.threads"),
        ("flag.on_error.bogus=drop", "unknown error reason"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(setting, hint):
    with pytest.raises(ConfigError, match=hint):
        load_config(settings=[setting])


def test_malformed_input_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="name=value"):
        load_config(settings=["flag.value"])
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(str(tmp_path / "list.yaml"))


def test_resources_are_no_change_of_the_result():
    a = load_config(settings=["resources.threads=1", "encoders.detect.spec=tiny"])
    b = load_config(settings=["resources.threads=4", "resources.workers=3", "encoders.detect.spec=tiny"])
    refuse_changes(a.result_settings(), b.result_settings(), out="o")


def test_changes_are_refused_with_both_values():
    a, b = CleanConfig(), load_config(settings=["flag.value=0.1", "suspicion.banks=2"])
    with pytest.raises(ChangedError, match=r"flag\.value: 0\.05 -> 0\.1; suspicion\.banks: 4 -> 2"):
        refuse_changes(a.result_settings(), b.result_settings(), out="o")
    assert [name for name, _, _ in differences(a.model_dump(), b.model_dump())] == ["flag.value", "suspicion.banks"]


def test_every_setting_has_a_description():
    names = [name for name, _ in all_settings()]
    assert "flag.value" in names
    assert "encoders.detect.spec" in names
    assert len(names) == len(set(names))


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        CleanConfig().max_error_rate = 0.5  # pyright: ignore
