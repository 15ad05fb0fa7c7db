"""genai_config.json: what lets onnxruntime-genai run an exported folder as it stands.

Fields: https://onnxruntime.ai/docs/genai/reference/config.html. The names of the graph are already those that it
expects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.decoder_graph import cache_shape
from pifa_deploy.onnx_folder import MODEL_FILE
from pifa_deploy.output_folder import write_json
from pifa_deploy.tokenizer_files import GENERATION_FILE

GENAI_FILE = "genai_config.json"
# Decoders that onnxruntime-genai 0.18 knows by the name that transformers gives them.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3")


def write_genai_config(config: Any, folder: Path) -> bool:
    """Writes genai_config.json into an ONNX folder; False, and no file, for an architecture that genai does not know.

    Args:
        config: the transformers configuration of the model.
        folder: holds the graph, and generation_config.json where the checkpoint has one.
    """
    if config.model_type not in MODEL_TYPES:
        return False
    write_json(folder / GENAI_FILE, genai_config(config, _generation(folder)))
    return True


def genai_config(config: Any, generation: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of genai_config.json: greedy, on the CPU; whoever loads it may say otherwise.

    Args:
        config: of a model whose type is one of MODEL_TYPES.
        generation: generation_config.json; its tokens go before those of `config`.
    """
    text = config.get_text_config(decoder=True)
    layers, kv_heads, head_dim = cache_shape(config)
    tokens = {name: generation.get(name, getattr(text, name, None)) for name in ("bos_token_id", "eos_token_id")}
    padding = generation.get("pad_token_id", getattr(text, "pad_token_id", None))
    if padding is None:
        ends = tokens["eos_token_id"]
        padding = ends[0] if isinstance(ends, list) else ends
    known = {name: value for name, value in {**tokens, "pad_token_id": padding}.items() if value is not None}
    return {
        "model": {
            **known,
            "type": config.model_type,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"provider_options": []},
                "hidden_size": text.hidden_size,
                "num_hidden_layers": layers,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": kv_heads,
                "head_size": head_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The graph returns a cache of its own: it does not grow in place.
        "search": {
            "do_sample": False,
            "max_length": text.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }


def _generation(folder: Path) -> dict[str, Any]:
    file = folder / GENERATION_FILE
    return dict(read_json_object(file)) if file.is_file() else {}
