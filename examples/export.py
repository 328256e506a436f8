"""A policy as an ONNX file, and a game server that plays it with NumPy and onnxruntime alone.

    python examples/export.py

It writes policy.onnx into the current folder.
"""

import json

import numpy as np
import onnxruntime
import torch

import tcg_flatpolicy as fp
from tcg_flatpolicy.export import export_onnx
from tcg_flatpolicy.games.essence_wars import OBSERVATION_DTYPE, EssenceWars, EssenceWarsEncoder

env = EssenceWars(num_games=64)
observations, _ = env.reset(seed=1)
policy = fp.FlatPolicy(env, encoder=EssenceWarsEncoder(env.legal_layout))  # train it first
export_onnx(policy, "policy.onnx", torch.as_tensor(observations))

server = onnxruntime.InferenceSession("policy.onnx")  # from here on without torch
noop = json.loads(server.get_modelmeta().custom_metadata_map["spec"])["noop"]
rng = np.random.default_rng(1)
for _ in range(20):
    states = observations.view(OBSERVATION_DTYPE)[:, 0]  # as the engine has them
    legal, n_legal = states["legal"].astype(np.int64), states["n_legal"].astype(np.int64)
    sent = {"observation.state": states["state"], "legal": legal, "n_legal": n_legal}
    log_probs, value = server.run(["log_probs", "value"], sent)
    place = (log_probs + rng.gumbel(size=log_probs.shape)).argmax(1)  # log_probs.argmax(1): mode
    actions = np.where(n_legal[:, None] > 0, legal[np.arange(len(legal)), place], noop)
    observations, *_ = env.step(actions)  # raises at an illegal one
print(f"20 steps of 64 games, {env.illegal_actions} illegal actions")
