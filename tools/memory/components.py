"""The components that every byte of a profile belongs to: their names in files, their titles, and what they mean."""

from __future__ import annotations

TEMPORARY, OTHER, UNATTRIBUTED = "temp_matrices", "other", "unattributed"
TITLES = {  # in the order they are drawn in, from the bottom
    "model_parameters": "parameters",
    "buffers": "buffers",
    "gradients": "gradients",
    "optimizer_states": "optimiser states",
    "activation_hooks": "saved activations",
    "checkpoint_inputs": "checkpoint inputs",
    "book_keeping": "book-keeping of the private step",
    "norm_samples": "norms",
    TEMPORARY: "temporary matrices",
    OTHER: "other",
    UNATTRIBUTED: "unattributed",
}
# What the tracker tells apart; the unattributed is what the allocator counts beyond it.
TRACKED = tuple(name for name in TITLES if name != UNATTRIBUTED)
# In the order of precedence: a storage belongs to the first of its holders (tools.memory.events.Role).
MEANINGS = {
    "model_parameters": "The model's weights, trained or frozen; a tied weight counts once.",
    "buffers": "Tensors of the model that are not parameters, such as the frequencies of rotary embeddings.",
    "gradients": "What a parameter's .grad holds, or will hold without a copy; in a private step the clipped sum too.",
    "optimizer_states": "What the optimiser keeps between steps: for Adam, two moments of every trained parameter.",
    "norm_samples": "Squared norms, one number per example and layer, and the clip factors computed from them.",
    "activation_hooks": "What autograd saves in the forward pass for the backward pass (torch's saved tensors), "
    "and what a checkpoint recomputes.",
    "checkpoint_inputs": "With gradient checkpointing: inputs of the checkpointed blocks, from which they are "
    "recomputed.",
    "book_keeping": "What only the private step keeps: layers' inputs and output gradients until the clip factors are "
    "known, per-example gradients, noise. What autograd saves anyway counts there, not here.",
    TEMPORARY: "Made in the current phase and held by nobody: intermediate results of single operations, "
    "such as the matrix from which a norm is computed.",
    OTHER: "The batch, and what outlives the phase it was made in without any of the holders above.",
    UNATTRIBUTED: "The allocator's total less all of the above: what the tracker did not see. Slightly negative where "
    "the tracker sees a storage die a moment late.",
}
