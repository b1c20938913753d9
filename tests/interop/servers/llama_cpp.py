"""llama.cpp's own server, with a model that is made here:  python llama_cpp.py DIRECTORY PORT

What the model says is noise, letter by letter: its weights are random. The tokens are counted all the same. It runs in
an environment of its own, which has the packages `xllamacpp` (the server) and `gguf` (the file of the model).
"""

import signal
import string
import sys
from pathlib import Path

import numpy as np
import xllamacpp
from gguf import GGUFWriter, TokenType

WIDTH, HEADS, CONTEXT = 64, 4, 2048
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


def make_model(path: Path) -> None:
    """One layer, and a vocabulary of single bytes and letters."""
    specials = [(b"<unk>", TokenType.UNKNOWN), (b"<s>", TokenType.CONTROL), (b"</s>", TokenType.CONTROL)]
    all_bytes = [(b"<0x%02X>" % byte, TokenType.BYTE) for byte in range(256)]
    letters = [(letter.encode(), TokenType.NORMAL) for letter in string.ascii_letters + "▁"]
    tokens = [*specials, *all_bytes, *letters]
    writer = GGUFWriter(path, "llama")
    writer.add_name("noise")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(1)
    output = random.standard_normal((len(tokens), WIDTH), dtype=np.float32)
    output[: len(specials) + len(all_bytes)] = 0  # so that letters are likelier than bytes that are no text
    tensors = {"token_embd": random.standard_normal((len(tokens), WIDTH), dtype=np.float32), "output": output}
    tensors |= {name: np.ones(WIDTH, np.float32) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{name}"] = random.standard_normal((WIDTH, WIDTH), dtype=np.float32)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(directory: Path, port: int) -> None:
    path = directory / "noise.gguf"
    make_model(path)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = CONTEXT
    parameters.n_parallel = 1
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    server = xllamacpp.Server(parameters)
    sys.stdout.write(f"{server.listening_address}\n")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
