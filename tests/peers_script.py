"""Runs in the peers' environment, without saegrid: read exported folders, and save the peers' own SAEs.

    python peers_script.py FOLDER

FOLDER holds `rows.safetensors` and `exported/{format}-{arch}/`. For each export, the peer's loader, encoder and decoder
write `theirs/{format}-{arch}.safetensors` (latent_acts, x_hat). Each of the peers' own SAEs is saved by their code as
`saved/{format}-{name}/` and likewise gives `theirs/{format}-{name}.safetensors`.
"""

import json
import sys
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

K, FACTOR = 32, 16


def load(format, folder):
    if format == "saelens":
        return SAE.load_from_disk(folder).to(torch.float32)
    if format == "dictionary_learning":
        return load_dictionary(str(folder), "cpu")[0]
    return SparseCoder.load_from_disk(folder)


def outputs(format, sae, x):
    if format == "sparsify":
        coded = sae.encode(x)
        acts = torch.zeros(len(x), sae.num_latents).scatter(1, coded.top_indices, coded.top_acts)
        return {"latent_acts": acts, "x_hat": sae.decode(coded.top_acts, coded.top_indices)}
    acts = sae.encode(x)
    return {"latent_acts": acts, "x_hat": sae.decode(acts)}


def write_outputs(format, folder, x, results):
    done = outputs(format, load(format, folder), x)
    save_file({key: value.contiguous() for key, value in done.items()}, results / f"{folder.name}.safetensors")


def own_saes(d_in):
    """(format, name, SAE) of each kind that a peer can save and this project can read."""
    d_sae = FACTOR * d_in
    shape = {"d_in": d_in, "d_sae": d_sae}
    for b_dec in (False, True):
        for rescale in (False, True):
            cfg = TopKSAEConfig(**shape, k=K, apply_b_dec_to_input=b_dec, rescale_acts_by_decoder_norm=rescale)
            yield "saelens", f"topk-b_dec_{b_dec}-rescale_{rescale}", TopKSAE(cfg)
        kinds = {"jumprelu": (JumpReLUSAE, JumpReLUSAEConfig), "standard": (StandardSAE, StandardSAEConfig)}
        for arch, (cls, config) in (kinds | {"gated": (GatedSAE, GatedSAEConfig)}).items():
            yield "saelens", f"{arch}-b_dec_{b_dec}", cls(config(**shape, apply_b_dec_to_input=b_dec))
    yield "saelens", "bfloat16", StandardSAE(StandardSAEConfig(**shape))
    yield "saelens", "old_topk", TopKSAE(TopKSAEConfig(**shape, k=K))
    yield "saelens", "old_standard", StandardSAE(StandardSAEConfig(**shape))
    yield "saelens", "old_gated", GatedSAE(GatedSAEConfig(**shape))
    yield "saelens", "batchtopk", BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=K))
    yield "dictionary_learning", "topk", AutoEncoderTopK(d_in, d_sae, K)
    yield "dictionary_learning", "batchtopk", BatchTopKSAE(d_in, d_sae, K)
    yield "dictionary_learning", "matryoshka", MatryoshkaBatchTopKSAE(d_in, d_sae, K, [d_sae // 2, d_sae // 2])
    yield "dictionary_learning", "jumprelu", JumpReluAutoEncoder(d_in, d_sae)
    yield "dictionary_learning", "relu", AutoEncoder(d_in, d_sae)
    yield "dictionary_learning", "relu_normed", AutoEncoder(d_in, d_sae)
    yield "dictionary_learning", "gated", GatedAutoEncoder(d_in, d_sae)
    yield "sparsify", "topk", SparseCoder(d_in, SparseCoderConfig(expansion_factor=FACTOR, k=K))


def fill(sae):
    """Random weights, non-zero biases, decoder rows of several norms, different thresholds."""
    for name, parameter in sae.named_parameters():
        scale = 2.0 if name in ("b_dec", "bias", "decoder_bias") else 0.1
        parameter.data.normal_(std=scale)
        if name == "threshold":
            parameter.data.uniform_(20, 60)
        if name in ("b_gate", "gate_bias", "b_mag", "mag_bias"):  # either cut may be the higher one
            parameter.data.uniform_(-60, -20)
    if isinstance(sae, StandardSAE):
        sae.b_enc.data.uniform_(-60, -20)
    if isinstance(sae, AutoEncoder):
        sae.encoder.bias.data.uniform_(-60, -20)
    for name, buffer in sae.named_buffers():
        if name in ("threshold", "topk_threshold"):
            buffer.fill_(35.0)


OLD = {
    **{"dataset_path": "some/data", "dataset_trust_remote_code": True, "context_size": 128, "prepend_bos": True},
    **{"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "hook_head_index": None},
    **{"finetuning_scaling_factor": False, "sae_lens_training_version": "5.9.1", "neuronpedia_id": None},
    **{"model_from_pretrained_kwargs": {"center_writing_weights": False}, "seqpos_slice": [None]},
}
"""Keys of cfg.json that SAELens 3 to 5 wrote and today's version does not."""


def make_old(arch, folder):
    """A folder as SAELens 5 wrote it; today's version still reads it."""
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text())
    shared = {name: cfg[name] for name in ("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input")}
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    fn = topk if arch == "topk" else {"activation_fn_str": "relu", "activation_fn_kwargs": {}}
    path.write_text(json.dumps({"architecture": arch, "normalize_activations": "none"} | shared | fn | OLD))


def save(format, name, sae, folder):
    if format == "sparsify":
        sae.save_to_disk(folder)
    elif format == "dictionary_learning":
        folder.mkdir(parents=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": type(sae).__name__} | ({"k": K} if hasattr(sae, "k") else {})
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": 1}}))
    elif name == "batchtopk":
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)
        if name.startswith("old_"):
            make_old(name.removeprefix("old_"), folder)
        if name == "bfloat16":  # rounds the weights, and computes in float32 if asked to
            path = folder / "cfg.json"
            path.write_text(path.read_text().replace("float32", "bfloat16"))


@torch.no_grad()
def main(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = load_file(folder / "rows.safetensors")["x"]
    (folder / "theirs").mkdir()
    for exported in sorted((folder / "exported").iterdir()):
        write_outputs(exported.name.split("-")[0], exported, x, folder / "theirs")
    for format, name, sae in own_saes(x.shape[1]):
        fill(sae)
        if name == "relu_normed":
            sae.decoder.weight /= sae.decoder.weight.norm(dim=0)
        saved = folder / "saved" / f"{format}-{name}"
        save(format, name, sae, saved)
        write_outputs(format, saved, x, folder / "theirs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
