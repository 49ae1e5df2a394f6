"""Small transformers built from configurations: nothing is downloaded.

Encoders have a classification head, which is tied to nothing; language models have output layers tied to the input
table where that is the configuration's default, which makes the table dense.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402

from tests.models.zoo import Case, tables_like, tied_tables  # noqa: E402

VOCABULARY, LONGEST, LABELS, PAD = 90, 24, 3, 0

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "num_labels": LABELS,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "pad_token_id": PAD}


def token_batches(labels: str, **extra: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], Iterable]:
    """Return a maker of batches of padded sentences; the length varies from batch to batch, as does the last size.

    `labels` is "class" (one a sentence) or "token" (the sentence itself, padding left out).
    """

    def make_batches(model: nn.Module) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(11)
        batches = []
        for size, longest in ((4, 9), (4, 12), (4, 9), (4, 7), (4, 12), (3, 8)):
            lengths = torch.randint(3, longest + 1, (size,))
            lengths[0] = longest
            mask = torch.arange(longest) < lengths[:, None]
            ids = torch.where(mask, torch.randint(3, VOCABULARY, (size, longest)), PAD)
            target = torch.randint(0, LABELS, (size,)) if labels == "class" else torch.where(mask, ids, -100)
            more = {name: function(ids) for name, function in extra.items()}
            batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": target, **more})
        return batches

    return make_batches


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def make_case(
    config: str, model: str, settings: dict, labels: str, *, extra: dict | None = None, name: str = "", **options
) -> Case | None:
    """Return a case, or None where this version of transformers has no such model."""
    config_class, model_class = getattr(transformers, config, None), getattr(transformers, model, None)
    if config_class is None or model_class is None:
        return None
    return Case(
        "transformers",
        name or model,
        lambda: model_class(config_class(**settings)),
        token_batches(labels, **(extra or {})),
        loss_of,
        per_sample=labels == "class",
        **options,
    )


def encoder(family: str, changed: dict | None = None, **options) -> Case | None:
    settings = {**ENCODER, **(changed or {})}
    return make_case(f"{family}Config", f"{family}ForSequenceClassification", settings, "class", **options)


def decoder(
    family: str, base: dict | None = None, changed: dict | None = None, head: str = "ForCausalLM", **options
) -> list[Case | None]:
    """Two cases: its output layer tied to the input table, and not."""
    settings = {**(DECODER if base is None else base), **(changed or {})}
    return [
        make_case(
            f"{family}Config",
            f"{family}{head}",
            {**settings, "tie_word_embeddings": tied},
            "token",
            name=f"{family}{head}{', tied' if tied else ''}",
            note="the output layer is the input table" if tied else "",
            **{"dense_of": tied_tables, **options},
        )
        for tied in (False, True)
    ]


def boxes(ids: torch.Tensor) -> torch.Tensor:
    """Corners of a box a token, for LayoutLM: left, top, right, bottom."""
    corners = torch.randint(0, 20, (*ids.shape, 2))
    return torch.cat([corners, corners + torch.randint(0, 20, (*ids.shape, 2))], -1)


def lower(**names: str) -> dict:
    """The encoder's settings under a family's own names for them."""
    return {names.get(name, name): value for name, value in ENCODER.items()}


def encoders() -> list[Case | None]:
    distil = lower(hidden_size="dim", num_hidden_layers="n_layers", num_attention_heads="n_heads")
    xlm = lower(hidden_size="emb_dim", num_hidden_layers="n_layers", num_attention_heads="n_heads") | {"n_words": 90}
    xlnet = {"vocab_size": VOCABULARY, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 12, "num_labels": LABELS}
    deberta = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 20}
    whole = {"dense_of": tables_like("*.rel_embeddings.*"), "note": "relative positions are used as a whole"}
    one_type = {"type_vocab_size": 1}
    funnel = {
        "vocab_size": VOCABULARY,
        "block_sizes": [1, 1],
        "d_model": 8,
        "n_head": 2,
        "d_head": 4,
        "d_inner": 12,
        "num_labels": 3,
    }
    return [
        encoder("Bert"),
        encoder("Roberta", one_type),
        encoder("XLMRoberta", one_type),
        encoder("Camembert", one_type),
        encoder("RobertaPreLayerNorm", one_type),
        encoder("Albert", {"embedding_size": 6}),
        encoder("Electra", {"embedding_size": 6}),
        encoder("DistilBert", distil | {"hidden_dim": 12}),
        encoder("MobileBert", {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}),
        encoder("SqueezeBert", {"embedding_size": 8} | {f"{x}_groups": 2 for x in ("q", "k", "v")}),
        encoder("MPNet", {"pad_token_id": 1}),
        encoder("Deberta", deberta, **whole, tolerance=1e-6),  # its norms and loss are in float32
        encoder("DebertaV2", deberta, **whole, tolerance=1e-6),
        encoder("ConvBert", {"embedding_size": 8, "head_ratio": 1, "conv_kernel_size": 3}),
        encoder("RoFormer", {"embedding_size": 8}),
        encoder("FNet"),
        encoder("MegatronBert"),
        encoder("RemBert", {"input_embedding_size": 6, "output_embedding_size": 6}),
        encoder("Nystromformer", {"segment_means_seq_len": 4, "num_landmarks": 4}),
        encoder("Yoso", {"use_expectation": True}),
        encoder("BigBird", {"attention_type": "original_full"}),
        encoder("Longformer", {"attention_window": 4}),
        encoder("Ernie", {"task_type_vocab_size": 3, "use_task_id": True}),
        encoder("Data2VecText", one_type),
        encoder("Canine", {"num_hash_functions": 2, "num_hash_buckets": 50, "local_transformer_stride": 4}),
        encoder("LayoutLM", {"max_2d_position_embeddings": 50}, extra={"bbox": boxes}),
        encoder("Lilt", {"hidden_size": 24, "max_2d_position_embeddings": 50}, extra={"bbox": boxes}),
        encoder("Luke", {"entity_vocab_size": 20, "entity_emb_size": 6}),
        encoder("Esm", {"position_embedding_type": "absolute", "mask_token_id": 4}),
        encoder("ModernBert", {"global_attn_every_n_layers": 1, "local_attention": 8}),
        encoder("XLM", xlm | {"num_labels": LABELS, "pad_index": PAD}),
        encoder("Flaubert", xlm | {"num_labels": LABELS, "pad_index": PAD}),
        make_case("XLNetConfig", "XLNetForSequenceClassification", xlnet, "class", dtype=torch.float32),
        make_case("FunnelConfig", "FunnelForSequenceClassification", funnel, "class", dtype=torch.float32),
        encoder("IBert", {"quant_mode": False, "pad_token_id": 1}),
        encoder("Splinter"),
    ]


def language_models() -> list[Case | None]:
    neo = {**GPT2, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
    neo |= {"max_position_embeddings": 40, "intermediate_size": 12}
    j = {**GPT2, "rotary_dim": 2}
    opt = {**DECODER, "ffn_dim": 12, "word_embed_proj_dim": 8}
    bloom = {"vocab_size": VOCABULARY, "hidden_size": 8, "n_layer": 1, "n_head": 2, "pad_token_id": PAD}
    xglm = {**SEQ2SEQ, "num_layers": 1, "attention_heads": 2, "ffn_dim": 12}
    mamba = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": PAD}
    mixture = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_experts": 2, "moe_intermediate_size": 12}
    return [
        *decoder("GPT2", GPT2, head="LMHeadModel"),
        *decoder("GPTNeo", neo),
        *decoder("GPTJ", j),
        *decoder("CodeGen", {**j, "n_embd": 16, "n_head": 4}),
        *decoder("GPTBigCode", GPT2),
        *decoder("GPTNeoX"),
        *decoder("OPT", opt),
        *decoder("Bloom", bloom),
        *decoder("BioGpt"),
        *decoder("XGLM", xglm),
        *decoder("Llama"),
        *decoder("Mistral"),
        *decoder("Mixtral", changed=mixture, dtype=torch.float32),
        *decoder("Qwen2"),
        *decoder("Qwen3"),
        *decoder("Gemma"),
        *decoder("Gemma2"),
        *decoder("Phi"),
        *decoder("StableLm"),
        *decoder("Falcon", {**bloom, "num_hidden_layers": 1, "num_attention_heads": 2}),
        *decoder("Cohere"),
        *decoder("Olmo"),
        *decoder("Mamba", mamba),
        *decoder("OpenAIGPT", GPT2, head="LMHeadModel"),
        *decoder("CTRL", {**GPT2, "dff": 12}, head="LMHeadModel"),
        *decoder("Bert", ENCODER, head="ForMaskedLM"),
        *decoder("Roberta", {**ENCODER, "type_vocab_size": 1}, head="ForMaskedLM"),
        *decoder("Electra", {**ENCODER, "embedding_size": 8}, head="ForMaskedLM"),
    ]


def translators() -> list[Case | None]:
    return [
        *decoder("T5", T5, head="ForConditionalGeneration")[1:],  # transformers 5 always ties these two
        *decoder("MT5", T5, head="ForConditionalGeneration")[1:],
        *decoder("SwitchTransformers", {**T5, "num_experts": 2}, head="ForConditionalGeneration"),
        *decoder("Bart", SEQ2SEQ, head="ForConditionalGeneration"),
        *decoder("MBart", SEQ2SEQ, head="ForConditionalGeneration"),
        *decoder("Pegasus", SEQ2SEQ, head="ForConditionalGeneration"),
        *decoder("Blenderbot", SEQ2SEQ, head="ForConditionalGeneration"),
        *decoder("BlenderbotSmall", SEQ2SEQ, head="ForConditionalGeneration"),
        *decoder("M2M100", SEQ2SEQ, head="ForConditionalGeneration"),
        *decoder("Marian", SEQ2SEQ, head="MTModel"),
        *decoder("LED", {**SEQ2SEQ, "attention_window": 4}, head="ForConditionalGeneration"),
        *decoder("PLBart", SEQ2SEQ, head="ForConditionalGeneration"),
    ]


CASES = [case for case in [*encoders(), *language_models(), *translators()] if case is not None]
