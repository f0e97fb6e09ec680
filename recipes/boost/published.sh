#!/bin/sh
# The searches of ExPO's paper (Zheng et al. 2025, arXiv 2404.16792, appendix B and table 7) as commands, one for each kind of model. Run
# one of them; each needs the models (hub names are fetched) and dev.jsonl: rows with "prompt", the first user turns of the 1,000 prompts
# in split test_gen of HuggingFaceH4/ultrafeedback_binarized.
#
# As in the paper: RM-Mistral-7B's mean reward decides, temperature 0.7, top-p 0.9, at most 2,048 tokens, bfloat16. The paper also cut to
# the 40 (its code: 50) likeliest tokens and had penalties of 0.1 for presence and frequency; it held no prompts out and took the highest mean.

# DPO stopped after 10 % of its steps: tries 5, 10, then 7, 8, 9; finds 8.
mergekit-lite boost alignment-handbook/zephyr-7b-sft-full chujiezheng/zephyr_0.1 --start 5 --final-step 1 \
    --prompts dev.jsonl --score reward:weqweasdas/RM-Mistral-7B --temperature 0.7 --top-p 0.9 --max-tokens 2048 --device auto -o ./zephyr_0.1-expo

# After 20 %: tries 2, 4, then 1, 3, then 2.5; finds 2.5.
mergekit-lite boost alignment-handbook/zephyr-7b-sft-full chujiezheng/zephyr_0.2 --start 2 --final-step 0.5 \
    --prompts dev.jsonl --score reward:weqweasdas/RM-Mistral-7B --temperature 0.7 --top-p 0.9 --max-tokens 2048 --device auto -o ./zephyr_0.2-expo

# After 40 %: tries 0.5, 0.6, then 0.4; finds 0.5.
mergekit-lite boost alignment-handbook/zephyr-7b-sft-full chujiezheng/zephyr_0.4 --start 0.5 --step 0.1 --final-step 0.1 \
    --prompts dev.jsonl --score reward:weqweasdas/RM-Mistral-7B --temperature 0.7 --top-p 0.9 --max-tokens 2048 --device auto -o ./zephyr_0.4-expo

# Finished models, here Tulu 2 7B, where 0.5 was found; the other pairs are in recipes/expo.
mergekit-lite boost allenai/tulu-2-7b allenai/tulu-2-dpo-7b --search grid --grid 0.1,0.2,0.3,0.4,0.5 \
    --prompts dev.jsonl --score reward:weqweasdas/RM-Mistral-7B --temperature 0.7 --top-p 0.9 --max-tokens 2048 --device auto -o ./tulu-2-dpo-7b-expo

# The paper's future work: an alpha of its own for each kind of module.
mergekit-lite boost allenai/tulu-2-7b allenai/tulu-2-dpo-7b --tune 'alpha[filter=mlp]=0:2' --tune 'alpha[filter=self_attn]=0:2' --trials 30 \
    --prompts dev.jsonl --score reward:weqweasdas/RM-Mistral-7B --temperature 0.7 --top-p 0.9 --max-tokens 2048 --device auto -o ./tulu-2-dpo-7b-parts
