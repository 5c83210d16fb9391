"""Models as they come in practice: offloaded, dispatched, adapted, quantised, in half precision."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from captum_mllm import LogitLens
from captum_mllm.adapters.devices import input_device, loaded, unwrap
from captum_mllm.adapters.head import head_matrix, head_size
from tests.oracle import families, tiny
from tests.oracle.published import ARC, MSEA

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

METHODS = {
    "lens": LogitLens,
    "lens-layer": lambda model: LogitLens(model, layer=1),
    "msea": lambda model: MSEA(model, scales=(0.5, 1.0, 1.5), consistency=True),
    "arc-msea": lambda model: ARC(MSEA(model, scales=(0.5, 1.0))),
}
LM = "model.language_model"
PARTS = (
    "model.vision_tower", "model.multi_modal_projector", f"{LM}.embed_tokens",
    *(f"{LM}.layers.{n}" for n in range(3)), f"{LM}.norm", f"{LM}.rotary_emb", "lm_head",
)  # fmt: skip
PLACES = {  # what is on disk; the rest stays where it is
    "head": ["lm_head"],
    "norm": [f"{LM}.norm"],
    "layers": [f"{LM}.layers.0", f"{LM}.layers.2"],
    "tower": ["model.vision_tower"],
    "embeddings": [f"{LM}.embed_tokens"],
    "all": list(PARTS),
}
FAMILIES = families.NAMES


def raises(*parts):
    """A ValueError with every part somewhere in its message, in this order."""
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def numbers(result):
    """All numbers of a result."""
    return [*result.grid_attr, result.token_attr, result.output_probs]


def check_equal(result, expected):
    for got, wanted in zip(numbers(result), numbers(expected), strict=True):
        assert torch.equal(got, wanted)


def check_close(result, expected, tolerance=1e-4):
    for got, wanted in zip(numbers(result), numbers(expected), strict=True):
        assert (got - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


def explained(subject, model=None):
    """What ARC over two scales makes of a subject, or of its model in another form."""
    method = ARC(MSEA(subject.model if model is None else model, scales=(1.0, 1.5)))
    return method.attribute(subject.encode(subject.wide_picture), subject.answer)


def differ(result, other):
    return not torch.allclose(result.grid_attr[0], other.grid_attr[0], atol=1e-2)


def placement(model):
    """Where every tensor is, and what sits on every module."""
    return {
        name: (
            [(n, t.device, t.dtype, t.requires_grad) for n, t in part.named_parameters()],
            [(n, t.device) for n, t in part.named_buffers()],
            part.training,
            sorted(vars(part)),
            id(vars(part).get("forward")),
            id(vars(part).get("_hf_hook")),
            [list(table) for n, table in vars(part).items() if n.startswith("_forward_")],
        )
        for name, part in model.named_modules()
    }


@pytest.fixture(scope="module")
def plain():
    return tiny.tiny_llava(seed=1)


@pytest.fixture(scope="module")
def expected_of(plain):
    """What each method makes of the plain model, made once."""
    results = {}

    def expected(method, inputs, answer):
        if method not in results:
            results[method] = METHODS[method](plain).attribute(inputs, answer)
        return results[method]

    return expected


@pytest.fixture
def fresh(plain):
    return copy.deepcopy(plain)


# ---- offloaded and dispatched ---------------------------------------------------------------


def offloaded(model, where, folder):
    """The model with weights that are meta tensors but while they are used, all on the CPU."""
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if where == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    on_disk = PLACES[where]
    places = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("where", ["cpu", "disk", *PLACES])
def test_offloaded_like_plain(expected_of, fresh, inputs, answer, where, tmp_path):
    model = offloaded(fresh, where, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    before = placement(model)
    for name, method in METHODS.items():
        result = method(model).attribute(inputs, answer)
        check_equal(result, expected_of(name, inputs, answer))
        assert placement(model) == before


@pytest.mark.parametrize("where", ["disk", "head"])
def test_offloaded_generates(plain, fresh, inputs, where, tmp_path):
    model = offloaded(fresh, where, tmp_path)
    results = [
        LogitLens(m).attribute(inputs, gen_args={"max_new_tokens": 4}) for m in (plain, model)
    ]
    assert torch.equal(results[0].output_ids, results[1].output_ids)
    check_equal(*results)


@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_families(name, tmp_path):
    subject = families.family(name)
    fresh = copy.deepcopy(subject.model)
    if name == "Idefics3":  # transformers' own forward fails where its vision encoder is offloaded
        places = {"model.vision_model": "cpu", "model.connector": "cpu"}
        places |= {"model.text_model": "disk", "lm_head": "disk"}
        settings = {"main_device": "cpu", "offload_dir": str(tmp_path), "force_hooks": True}
        model = accelerate.dispatch_model(fresh, places, **settings)
    else:
        model = accelerate.disk_offload(fresh, str(tmp_path), execution_device="cpu")
    before = placement(model)
    check_equal(explained(subject, model), explained(subject))
    assert placement(model) == before


def test_loaded_with_a_device_map(plain, inputs, answer, tmp_path):
    plain.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(PARTS, "cpu") | {"lm_head": "disk", "model.vision_tower": "disk"}
    model = type(plain).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "weights")
    )
    check_close(MSEA(model).attribute(inputs, answer), MSEA(plain).attribute(inputs, answer), 1e-6)


def test_offloaded_in_training_mode(plain, fresh, inputs, answer, tmp_path):
    model = offloaded(fresh, "disk", tmp_path).train()
    before = placement(model)
    check_equal(MSEA(model).attribute(inputs, answer), MSEA(plain).attribute(inputs, answer))
    assert placement(model) == before


def test_offloaded_after_a_failure(fresh, inputs, answer, tmp_path):
    model = offloaded(fresh, "all", tmp_path)

    def fail(*_):
        raise RuntimeError("out of luck")

    tower = model.get_encoder(modality="image")
    layer = next(part for name, part in tower.named_modules() if name.endswith("layers.0"))
    handle = layer.register_forward_hook(fail)
    before = placement(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        MSEA(model).attribute(inputs, answer)
    assert placement(model) == before
    handle.remove()


def test_model_without_weights(fresh, inputs, answer):
    with raises("model: its input embeddings are on the meta device", "from_pretrained"):
        LogitLens(fresh.to("meta")).attribute(inputs, answer)


def test_head_without_weights(fresh, inputs, answer):
    fresh.lm_head.to("meta")
    with raises("its LM head (Linear) is not the plain linear map", "meta device"):
        head_matrix(fresh.lm_head)


def test_several_hooks_on_a_module(fresh):
    head, weight = fresh.lm_head, fresh.lm_head.weight.detach().clone()
    accelerate.cpu_offload(head, execution_device="cpu")
    accelerate.hooks.add_hook_to_module(head, accelerate.hooks.ModelHook(), append=True)
    with loaded(head):
        assert torch.equal(head.weight, weight)
    assert head.weight.is_meta
    assert torch.equal(head_matrix(head)[0], weight)
    assert head_size(head) == len(weight)


@pytest.mark.parametrize("where", ["cpu", "disk", "embeddings", "head"])
def test_input_device(fresh, where, tmp_path):
    assert input_device(fresh) == torch.device("cpu")
    assert input_device(offloaded(fresh, where, tmp_path)) == torch.device("cpu")


# ---- wrappers -------------------------------------------------------------------------------


def test_data_parallel(plain, inputs, answer):
    wrapped = nn.DataParallel(plain)
    assert unwrap(wrapped) is plain
    check_equal(
        LogitLens(wrapped).attribute(inputs, answer), LogitLens(plain).attribute(inputs, answer)
    )


class FullyShardedDataParallel(nn.Module):
    """Has the name of torch's, which needs processes to make."""


def test_sharded():
    with raises("model: its weights are sharded", "FullyShardedDataParallel"):
        LogitLens(FullyShardedDataParallel())


# ---- PEFT -----------------------------------------------------------------------------------

ATTENTION = rf"{LM}\..*\.(q_proj|v_proj)"


def adapted(model, config=None, **settings):
    """A PEFT model with adapters of random weights that matter."""
    if config is None:
        settings = {"target_modules": ATTENTION, "init_lora_weights": False, **settings}
        config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of what it calls in transformers
        return peft.get_peft_model(copy.deepcopy(model), config)


HEAD = rf"{ATTENTION}|lm_head"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [ATTENTION, HEAD], ids=["layers", "layers-and-head"])
def test_lora_like_merged(plain, expected_of, inputs, answer, targets, method):
    model = adapted(plain, target_modules=targets)
    merged = copy.deepcopy(model).merge_and_unload()
    before = placement(model)
    result = METHODS[method](model).attribute(inputs, answer)
    check_close(result, METHODS[method](merged).attribute(inputs, answer))
    assert differ(result, expected_of(method, inputs, answer))
    assert placement(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_like_merged_in_every_family(name):
    subject = families.family(name)
    model = adapted(subject.model, target_modules=r".*(language_model|text_model).*\.(q|v)_proj")
    merged = copy.deepcopy(model).merge_and_unload()
    result = explained(subject, model)
    check_close(result, explained(subject, merged))
    assert differ(result, explained(subject))


def test_lora_on_half_precision(inputs, answer):
    model = adapted(tiny.tiny_llava(seed=1, dtype=torch.bfloat16), target_modules=HEAD)
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.float32
    full = adapted(tiny.tiny_llava(seed=1), target_modules=HEAD)
    full.load_state_dict(model.state_dict())
    check_alike(
        LogitLens(model).attribute(inputs, answer), LogitLens(full).attribute(inputs, answer)
    )


def test_lora_turned_off_and_merged_in_place(plain, inputs, answer):
    model = adapted(plain, target_modules=HEAD)
    with_lora = LogitLens(model).attribute(inputs, answer)
    with model.disable_adapter():
        check_equal(
            LogitLens(model).attribute(inputs, answer), LogitLens(plain).attribute(inputs, answer)
        )
    model.merge_adapter()
    check_close(LogitLens(model).attribute(inputs, answer), with_lora)


def test_several_adapters(plain, inputs, answer):
    model = adapted(plain, target_modules=HEAD)
    more = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model.add_adapter("more", more)
    one = LogitLens(model).attribute(inputs, answer)
    for both in (["more"], ["default", "more"]):
        model.base_model.set_adapter(both)
        merged = copy.deepcopy(model).merge_and_unload()
        result = LogitLens(model).attribute(inputs, answer)
        check_close(result, LogitLens(merged).attribute(inputs, answer))
        assert differ(result, one)


def test_lora_with_a_bias(plain):
    head = adapted(plain, target_modules=["lm_head"], lora_bias=True).get_output_embeddings().eval()
    nn.init.normal_(head.lora_B["default"].bias)
    check_head(head, 24)


def check_head(head, dim, tolerance=1e-5):
    """The head's own outputs are those of the matrix and the bias; nothing needs a gradient."""
    weight, bias = head_matrix(head)
    states = torch.randn(5, dim, dtype=weight.dtype)
    ours = nn.functional.linear(states, weight, bias)
    theirs = head(states)
    assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    assert not weight.requires_grad
    assert type(weight) is torch.Tensor
    assert head_size(head) == len(weight) == theirs.shape[-1]


def test_modules_to_save(plain, inputs, answer):
    model = adapted(plain, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.normal_()
    merged = copy.deepcopy(model).merge_and_unload()
    result = LogitLens(model).attribute(inputs, answer)
    check_close(result, LogitLens(merged).attribute(inputs, answer))
    with model.disable_adapter():
        check_equal(
            LogitLens(model).attribute(inputs, answer), LogitLens(plain).attribute(inputs, answer)
        )


def test_trained_rows_of_the_head(plain, inputs, answer):
    rows = {"lm_head": answer.tolist()[:2]}
    model = adapted(plain, trainable_token_indices=rows)
    with torch.no_grad():
        model.get_output_embeddings().token_adapter.trainable_tokens_delta["default"].normal_()
    merged = copy.deepcopy(model).merge_and_unload()
    result = LogitLens(model).attribute(inputs, answer)
    check_close(result, LogitLens(merged).attribute(inputs, answer))
    with model.disable_adapter():
        check_equal(
            LogitLens(model).attribute(inputs, answer), LogitLens(plain).attribute(inputs, answer)
        )


def test_other_adapters(plain, inputs, answer):
    scaled = peft.IA3Config(
        target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False
    )
    low_rank = peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
    for config in (scaled, low_rank):
        model = adapted(plain, config)
        merged = copy.deepcopy(model).merge_and_unload()
        result = LogitLens(model).attribute(inputs, answer)
        check_close(result, LogitLens(merged).attribute(inputs, answer))
        assert differ(result, LogitLens(plain).attribute(inputs, answer))


def test_adapters_on_the_head_that_are_more_than_a_sum(plain, inputs, answer):
    weighted = adapted(plain, target_modules=["lm_head"], use_dora=True)
    loha = peft.LoHaConfig(r=2, target_modules=["lm_head"], init_weights=False)
    for model, why in ((weighted, "more than a plain LoRA"), (adapted(plain, loha), "not a LoRA")):
        with raises("its LM head (Linear) is not the plain linear map", why, "merge_and_unload"):
            LogitLens(model).attribute(inputs, answer)
        merged = copy.deepcopy(model).merge_and_unload()
        model.merge_adapter()
        check_close(
            LogitLens(model).attribute(inputs, answer), LogitLens(merged).attribute(inputs, answer)
        )


def test_prompt_learning(plain):
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        sizes = {"token_dim": 24, "num_layers": 3, "num_attention_heads": 4}
        for name, value in sizes.items():
            setattr(config, name, value)
        model = adapted(plain, config)
        with raises("model: its PEFT adapter 'default'", "in front of the inputs", "base model"):
            LogitLens(model)


def test_lora_that_waits_for_tokens(plain):
    with raises("model: its PEFT adapter 'default' (LORA)", "alora_invocation_tokens"):
        LogitLens(adapted(plain, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]))


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "cpu"])
def test_lora_on_offloaded(plain, inputs, answer, on_disk, tmp_path):
    model = adapted(plain, target_modules=HEAD)
    expected = MSEA(model).attribute(inputs, answer)
    inner = unwrap(model)
    if on_disk:
        accelerate.disk_offload(inner, str(tmp_path), execution_device="cpu")
    else:
        accelerate.cpu_offload(inner, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    before = placement(model)
    check_equal(MSEA(model).attribute(inputs, answer), expected)
    assert placement(model) == before


# ---- quantised heads ------------------------------------------------------------------------


class Quantized(torch.Tensor):
    """Stands for the tensors of torchao and quanto: whole numbers and a scale, seen as floats."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def dequantize(self):
        return self.numbers * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        args = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or {}))


def test_quantized_tensor(fresh, inputs, answer):
    scale = fresh.lm_head.weight.detach().abs().amax(1, keepdim=True) / 7
    weight = Quantized((fresh.lm_head.weight.detach() / scale).round().to(torch.int8), scale)
    rounded = copy.deepcopy(fresh)
    rounded.lm_head.weight = nn.Parameter(weight.dequantize())
    expected = LogitLens(rounded).attribute(inputs, answer)
    fresh.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    check_equal(LogitLens(fresh).attribute(inputs, answer), expected)


@pytest.mark.filterwarnings("ignore")  # of these packages, when imported
@pytest.mark.parametrize("package", ["torchao", "optimum.quanto", "bitsandbytes"])
def test_quantized_by(package):
    library = pytest.importorskip(package)
    part = nn.Sequential(nn.Linear(128, 97, bias=package == "bitsandbytes"))
    plain = part[0].weight.detach().clone()
    if package == "torchao":
        library.quantize_(part, library.quantization.Int8WeightOnlyConfig())
    elif package == "optimum.quanto":
        library.quantize(part, weights=library.qint8)
        library.freeze(part)
    else:
        head = library.nn.Linear4bit(128, 97, compute_dtype=torch.float32)
        head.load_state_dict(part[0].state_dict())
        part = nn.Sequential(head.to("cpu"))
        part(torch.zeros(1, 128))
    check_head(part[0], 128)
    assert not torch.equal(head_matrix(part[0])[0], plain)


def test_quantized_beyond_reading(fresh, inputs, answer):
    wanted = fresh.lm_head
    whole, eighth = wanted.weight.detach().to(torch.int8), wanted.weight.detach()
    for weight in (whole, eighth.to(torch.float8_e4m3fn), torch.zeros(97 * 12, 1).byte()):
        head = nn.Linear(24, 97, bias=False)
        head.weight = nn.Parameter(weight, requires_grad=False)
        with raises("its LM head (Linear)", str(weight.dtype), "modules_to_not_convert"):
            head_matrix(head)


@pytest.mark.filterwarnings("ignore")  # torch's: deprecated, but still met
def test_quantized_dynamically():
    from torch.ao.nn.quantized.dynamic import Linear

    with raises("its LM head (Linear)", "packed with its quantised weight", "skip_modules"):
        head_matrix(Linear(24, 97))
    assert head_size(Linear(24, 97)) == 97


def test_plain_heads_are_views(plain):
    weight, bias = head_matrix(plain.lm_head)
    assert weight.data_ptr() == plain.lm_head.weight.data_ptr()
    assert not weight.requires_grad
    assert bias is None
    biased = nn.Linear(3, 5)
    assert head_matrix(biased)[1].data_ptr() == biased.bias.data_ptr()


# ---- precision and attention ----------------------------------------------------------------


def check_alike(result, expected, least=0.95):
    """The maps go together: their correlation over all cells of all tokens."""
    for got, wanted in zip(result.grid_attr, expected.grid_attr, strict=True):
        assert torch.isfinite(got).all()
        both = torch.stack([got.flatten(), wanted.flatten()])
        assert torch.corrcoef(both)[0, 1] > least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name, dtype):
    check_alike(explained(families.family(name, dtype=dtype)), explained(families.family(name)))


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_implementations(name):
    sdpa, eager = (families.family(name, attn=attn) for attn in ("sdpa", "eager"))
    check_close(explained(sdpa), explained(eager), tolerance=1e-3)


# ---- GPU ------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_gpu
@pytest.mark.parametrize("where", PLACES)
def test_dispatched_over_gpu_cpu_and_disk(expected_of, fresh, inputs, answer, where, tmp_path):
    places = {part: "disk" if part in PLACES[where] else 0 for part in PARTS}
    if where != "all":
        places[f"{LM}.layers.1"] = "cpu"
    model = accelerate.dispatch_model(fresh, places, main_device=0, offload_dir=str(tmp_path))
    assert input_device(model) == torch.device("cuda:0")
    before = placement(model)
    for name, method in METHODS.items():
        result = method(model).attribute(inputs, answer)
        check_close(result, expected_of(name, inputs, answer), 1e-3)
        assert placement(model) == before


@needs_two
@pytest.mark.parametrize("second", [PARTS[1:], PARTS[5:], PARTS[-1:], PARTS[:1]], ids=len)
def test_dispatched_over_two_gpus(expected_of, fresh, inputs, answer, second):
    places = {part: int(part in second) for part in PARTS}
    model = accelerate.dispatch_model(fresh, places)
    for name, method in METHODS.items():
        result = method(model).attribute(inputs, answer)
        check_close(result, expected_of(name, inputs, answer), 1e-3)


@needs_gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_families_on_a_gpu(name, monkeypatch):
    # TF32, the default of convolutions, has 10 bits only.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    subject = families.family(name)
    on_gpu = copy.deepcopy(subject.model).cuda()
    check_close(explained(subject, on_gpu), explained(subject), 1e-3)
