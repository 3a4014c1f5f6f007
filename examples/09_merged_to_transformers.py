#!/usr/bin/env python3
"""Lesson 9: the tokens that kvfold video keeps, read by a Hugging Face model.

    kvfold video clip.mp4 --mmproj mmproj.gguf -o clip
    09_merged_to_transformers.py MODEL_DIR clip.safetensors "What happens in the video?"

MODEL_DIR is the language model the projector was trained for. Its embedding layer turns the words into rows;
the video's rows stand between them (inputs_embeds). Models with one-dimensional positions need nothing more;
for M-RoPE the file has the planes t, y, x (tensor "mrope", from --positions keep) as position_ids.
Needs transformers, torch and safetensors.

SPDX-License-Identifier: Apache-2.0
"""
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder, video, question):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    embed = model.get_input_embeddings()
    rows = load_file(video)["embeddings"].to(embed.weight.dtype)
    if rows.shape[1] != embed.weight.shape[1]:
        sys.exit("the embeddings have %d numbers, the model reads %d" % (rows.shape[1], embed.weight.shape[1]))

    def words(text):
        return embed(tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids)[0]

    head = words("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    tail = words("\n\n%s<|im_end|>\n<|im_start|>assistant\n" % question)
    prompt = torch.cat([head, rows, tail])[None]
    with torch.no_grad():
        out = model.generate(inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long),
                             max_new_tokens=128, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
