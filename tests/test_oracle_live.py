"""transformers asked today, with torch: what it loads of ours, what we load of its, and the same numbers from both.

`make test-oracle` makes the environment; without torch these tests are skipped, and `tests/test_oracle_golden.py` has
transformers' answers of the day they were written.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hptjax.models.folder import load_folder, save_folder  # noqa: E402
from hptjax.models.folder_config import write_config  # noqa: E402
from tests import decoder_calls  # noqa: E402
from tests.oracles import models, reference  # noqa: E402
from tests.oracles.cases import (  # noqa: E402
    FAMILIES,
    GREEDY_TOKENS,
    LENGTHS,
    PROMPT_LENGTHS,
    TEMPERATURE,
    golden,
    padded,
    sequences,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and transformers warn of their own affairs
TOLERANCE = 1e-4
OTHER_SIZES = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, transformers' model as read from its own folder, that folder, our shape, our parameters)."""
    folder = tmp_path_factory.mktemp(request.param)
    made = models.make_model(request.param, seed=11, **OTHER_SIZES)
    made.save_pretrained(str(folder), max_shard_size="20KB")
    return request.param, models.load_model(folder), folder, *load_folder(folder)


def prompts():
    return [part[:length] for part, length in zip(sequences(), PROMPT_LENGTHS, strict=True)]


def bits(model, dtype="float32"):
    """Every parameter of a transformers model, by its key, rounded to a type, as bytes."""
    rounded = {key: value.detach().to(getattr(torch, dtype)).float() for key, value in model.named_parameters()}
    return {key: value.numpy().tobytes() for key, value in rounded.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_live_golden_values_are_what_transformers_says_today(name):
    folder, said = golden(name)
    found = reference.everything(models.load_model(folder))
    assert found.keys() == said.keys()
    for key, value in said.items():
        if key == "sampled":
            continue  # torch's generator may change; the tokens that were kept are scored again below
        if key == "sampled_logprobs":
            model = models.load_model(folder)
            value = np.stack(
                [
                    reference.completion_logprobs(model, prompt, tokens, TEMPERATURE)
                    for prompt, tokens in zip(prompts(), said["sampled"], strict=True)
                ]
            )
            np.testing.assert_allclose(value, said[key], rtol=0, atol=1e-5)
        else:
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def test_live_logits_padded_packed_and_cached(family):
    _, model, _, config, params = family
    parts = sequences()
    expected = reference.logits(model, padded(parts), LENGTHS)
    *alone, together = decoder_calls.forward_logits(params, config, *decoder_calls.padded_and_packed(parts))
    cached = decoder_calls.cached_logits(params, config, padded(parts), LENGTHS, PROMPT_LENGTHS)
    for number, (part, beside) in enumerate(zip(parts, decoder_calls.apart(together, parts), strict=True)):
        wanted = expected[number, : len(part)]
        np.testing.assert_allclose(alone[number][: len(part)], wanted, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(beside, wanted, rtol=0, atol=TOLERANCE)
        theirs = reference.cached_logits(model, part, PROMPT_LENGTHS[number])
        np.testing.assert_allclose(cached[number], theirs, rtol=0, atol=TOLERANCE)


def test_live_loss_and_gradients(family):
    _, model, _, config, params = family
    loss, gradients = decoder_calls.loss_and_gradients(params, config, sequences(), PROMPT_LENGTHS)
    expected_loss, expected = reference.loss_and_gradients(model, sequences(), PROMPT_LENGTHS)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        assert np.linalg.norm(gradients[key] - value) <= TOLERANCE * np.linalg.norm(value), key


def test_live_greedy_and_sampled_tokens(family):
    """transformers generates what we do, and gives our samples the log-probs that our sampler recorded."""
    _, model, _, config, params = family
    ours = decoder_calls.sample(params, config, prompts(), GREEDY_TOKENS, temperature=1.0, top_k=1)
    theirs = [reference.generate(model, prompt, GREEDY_TOKENS) for prompt in prompts()]
    assert [sample.completion_tokens.tolist() for sample in ours] == [tokens.tolist() for tokens in theirs]
    drawn = decoder_calls.sample(params, config, prompts(), 24, temperature=TEMPERATURE)
    for sample, prompt in zip(drawn, prompts(), strict=True):
        scored = reference.completion_logprobs(model, prompt, sample.completion_tokens, TEMPERATURE)
        np.testing.assert_allclose(sample.sampler_logprobs, scored, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 6000])
def test_live_transformers_loads_what_we_save_to_the_bit(family, tmp_path, dtype, shard_bytes):
    """No missing and no unexpected key (`load_model` asserts it), the same bits, and the same numbers."""
    name, model, folder, config, params = family
    beside = json.loads((folder / "config.json").read_text())
    save_folder(tmp_path, config, params, dtype=dtype, shard_bytes=shard_bytes, beside=beside)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 6000)
    back = models.load_model(tmp_path)
    assert bits(back) == bits(model, dtype)
    assert type(back) is type(model)
    assert back.config.rope_parameters == model.config.rope_parameters
    assert back.config.eos_token_id == model.config.eos_token_id
    if dtype == "float32":
        rows = padded(sequences())
        assert np.array_equal(reference.logits(back, rows, LENGTHS), reference.logits(model, rows, LENGTHS))
    again, params_again = load_folder(tmp_path)
    assert again == config
    save_folder(tmp_path / "again", again, params_again, dtype=dtype, shard_bytes=shard_bytes, beside=beside)
    for path in tmp_path.iterdir():
        assert path.is_dir() or path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert name in FAMILIES


def test_live_config_of_the_older_form_means_the_same(family, tmp_path):
    """The form that we write is the published one: transformers reads the same model from it as from its own."""
    import transformers

    _, model, folder, config, _ = family
    raw = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in raw
    assert "rope_scaling" not in raw
    older = write_config(config, "float32", raw)
    assert "rope_parameters" not in older
    (tmp_path / "config.json").write_text(json.dumps(older))
    read = transformers.AutoConfig.from_pretrained(str(tmp_path))
    for field in ("rope_parameters", "num_key_value_heads", "tie_word_embeddings", "eos_token_id", "rms_norm_eps"):
        assert getattr(read, field) == getattr(model.config, field), field
    assert read.head_dim == config.head_dim


def test_live_transformers_loads_broken_folders_that_we_refuse(tmp_path):
    """A layer left out: transformers makes one up and says so in a log line at most."""
    from safetensors.numpy import load_file, save_file

    models.make_model("qwen2").save_pretrained(str(tmp_path))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if ".layers.1." not in key}, path, {"format": "pt"})
    with pytest.raises(AssertionError, match="missing"):
        models.load_model(tmp_path)
    models.transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.input_layernorm\.weight"):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2_tied"])
def test_live_exported_folder_is_whole(name, tmp_path):
    """Tokenizer, chat template and stop tokens come with the weights, and `generate` works from them alone."""
    import transformers

    from hptjax.build.weights import write_model
    from hptjax.config import ModelConfig
    from hptjax.data.tokenizer import load_tokenizer

    source = models.make_folder(name, tmp_path / "source")
    shape, params = load_folder(source)
    tokenizer = load_tokenizer(source)
    out = tmp_path / "out"
    write_model(out, shape, params, ModelConfig(path=str(source)), tokenizer, dtype="bfloat16", shard_bytes=8000)
    ours, theirs = models.load_model(out), models.load_model(source)
    assert bits(ours) == bits(theirs)
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    assert len(ours.generation_config.eos_token_id) == 2
    read = transformers.AutoTokenizer.from_pretrained(str(out))
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"}]
    prompt = read.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|start|>system\nThink.<|end|>\n<|start|>user\n2 + 2?<|end|>\n<|start|>assistant\n"
    ids = read(prompt, return_tensors="pt", add_special_tokens=False)
    said = ours.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=read.pad_token_id)
    stops = ours.generation_config.eos_token_id
    new = said[0, ids["input_ids"].shape[1] :].tolist()
    assert len(new) == 40 or new[-1] in stops
    greedy = decoder_calls.sample(
        params, shape, [ids["input_ids"][0].numpy().astype(np.int32)], 40, temperature=1.0, top_k=1
    )
    assert greedy[0].completion_tokens[: len(new)].tolist() == new


def test_live_converted_folder_loads(family, tmp_path):
    from hptjax.models.folder_copy import convert_folder

    _, model, folder, _, _ = family
    convert_folder(folder, tmp_path / "out", dtype="bfloat16", shard_bytes=7000)
    assert bits(models.load_model(tmp_path / "out")) == bits(model, "bfloat16")


# ---- adapters, against PEFT ----


TARGETS = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize(("targets", "stabilised"), [(TARGETS[0], False), (TARGETS[1], True)])
def test_live_peft_loads_our_adapter_and_merges_it_as_we_do(family, tmp_path, targets, stabilised):
    peft = pytest.importorskip("peft")
    from hptjax.models.lora import adapted, adapter_shapes, merged
    from hptjax.models.lora_config import AdapterShape
    from hptjax.models.lora_folder import save_adapter

    _, model, folder, config, params = family
    rng = np.random.default_rng(2)
    shapes = adapter_shapes(config, 3, targets)["layers"]
    adapters = {
        "layers": {
            name: {factor: rng.normal(0, 0.1, sizes).astype(np.float32) for factor, sizes in one.items()}
            for name, one in shapes.items()
        }
    }
    shape = AdapterShape(3, 12.0, targets, stabilised)
    save_adapter(tmp_path, config, adapters, shape, dtype="float32", base=str(folder))
    theirs = peft.PeftModel.from_pretrained(models.load_model(folder), str(tmp_path)).eval()
    wanted = reference.logits(theirs, padded(sequences()), LENGTHS)
    assert np.abs(wanted - reference.logits(model, padded(sequences()), LENGTHS)).max() > 0.1
    whole = theirs.merge_and_unload()
    for tree in (adapted(params, adapters, shape.scale), merged(params, adapters, shape.scale)):
        found = decoder_calls.forward_logits(tree, config, *decoder_calls.padded_and_packed(sequences()))
        for number, part in enumerate(sequences()):
            np.testing.assert_allclose(found[number, : len(part)], wanted[number, : len(part)], rtol=0, atol=TOLERANCE)
    save_folder(
        tmp_path / "merged", config, jax.tree.map(np.asarray, merged(params, adapters, shape.scale)), dtype="float32"
    )
    ours = dict(models.load_model(tmp_path / "merged").named_parameters())
    for key, value in whole.named_parameters():
        np.testing.assert_allclose(ours[key].detach(), value.detach(), rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("stabilised", [False, True])
def test_live_we_read_an_adapter_that_peft_wrote(family, tmp_path, stabilised):
    peft = pytest.importorskip("peft")
    from hptjax.models.lora import adapted
    from hptjax.models.lora_config import read_adapter_shape
    from hptjax.models.lora_folder import load_adapter

    _, _, folder, config, params = family
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(TARGETS[1]), task_type="CAUSAL_LM", use_rslora=stabilised
    )
    theirs = peft.get_peft_model(models.load_model(folder), settings).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_B" in key:  # zero, as PEFT starts it
                value.normal_(0, 0.1)
    theirs.save_pretrained(str(tmp_path))
    shape = read_adapter_shape(tmp_path)
    assert (shape.rank, shape.alpha, shape.targets) == (4, 6.0, TARGETS[1])
    assert shape.scale == (3.0 if stabilised else 1.5)
    tree = adapted(params, load_adapter(tmp_path, config), shape.scale)
    wanted = reference.logits(theirs, padded(sequences()), LENGTHS)
    found = decoder_calls.forward_logits(tree, config, *decoder_calls.padded_and_packed(sequences()))
    for number, part in enumerate(sequences()):
        np.testing.assert_allclose(found[number, : len(part)], wanted[number, : len(part)], rtol=0, atol=TOLERANCE)
