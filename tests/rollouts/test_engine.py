"""The choice among engines."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from grpo.config import ConfigError, load_config
from policy import save
from rollouts import EngineConfig, EngineError, SamplingParams, make_engine
from rollouts.engine import VllmServerConfig
from tests.policies import tiny_policy
from tests.recipes import write_recipe


def test_an_engine_is_made_of_a_policy_or_of_its_folder(tmp_path: Path) -> None:
    save(tiny_policy(), tmp_path)
    params = SamplingParams(max_completion_length=8, seed=1)
    one, two = (make_engine(source, EngineConfig()) for source in (tiny_policy(), tmp_path))
    assert one.generate([[3, 4]], 2, params) == two.generate([[3, 4]], 2, params)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_colocated_engine_without_vllm_says_how_to_install_it() -> None:
    with pytest.raises(EngineError, match=r"needs vLLM.* pip install 'grpo-reasoning\[vllm\]'"):
        make_engine(tiny_policy(), EngineConfig(kind="vllm_colocate"))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://somewhere", "http://"])
def test_urls_are_checked(url: str) -> None:
    with pytest.raises(ValueError, match="must be like http://127.0.0.1:8000"):
        VllmServerConfig(urls=(url,))


@pytest.mark.parametrize("kind", ["vllm_colocate", "vllm_server"])
def test_speculation_is_refused_where_vllm_samples(tmp_path: Path, kind: str) -> None:
    settings = [f"engine.kind={kind}", "engine.speculative.num_speculative_tokens=2"]
    with pytest.raises(ConfigError, match=rf"num_speculative_tokens is 2, but only the built-in engine .* is {kind}"):
        load_config(write_recipe(tmp_path), settings)


def test_an_empty_stop_string_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stop_strings.1: .* at least 1 character"):
        load_config(write_recipe(tmp_path), ["stop_strings=['a', '']"])


def test_one_url_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="listed twice"):
        VllmServerConfig(urls=("http://127.0.0.1:8000", "http://127.0.0.1:8000"))


def test_keys_of_the_servers_are_checked_as_all_of_a_recipe_are(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    config = load_config(recipe, ["engine.kind=vllm_server", "engine.vllm_server.urls=['http://10.0.0.2:8000/']"])
    assert config.engine.vllm_server.urls == ("http://10.0.0.2:8000",)
    with pytest.raises(ConfigError, match="did you mean 'engine.vllm_server.urls'"):
        load_config(recipe, ["engine.vllm_server.url=http://10.0.0.2:8000"])
