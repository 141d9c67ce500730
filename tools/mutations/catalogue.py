"""All mutations: each a mistake that would void the guarantee, or the gradient's exactness, without an error."""

from __future__ import annotations

from tools.mutations.accounts import ACCOUNT_MUTATIONS
from tools.mutations.clip_norms import CLIP_NORM_MUTATIONS
from tools.mutations.correlated import CORRELATED_MUTATIONS
from tools.mutations.gradients import GRADIENT_MUTATIONS
from tools.mutations.host import HOST_MUTATIONS
from tools.mutations.long_context import LONG_CONTEXT_MUTATIONS
from tools.mutations.mechanism import MECHANISM_MUTATIONS
from tools.mutations.rules import RULE_MUTATIONS
from tools.mutations.sequence import SEQUENCE_MUTATIONS
from tools.mutations.trainers import TRAINER_MUTATIONS
from tools.mutations.users import USER_MUTATIONS

MUTATIONS = (
    *ACCOUNT_MUTATIONS,
    *CLIP_NORM_MUTATIONS,
    *CORRELATED_MUTATIONS,
    *GRADIENT_MUTATIONS,
    *LONG_CONTEXT_MUTATIONS,
    *MECHANISM_MUTATIONS,
    *HOST_MUTATIONS,
    *RULE_MUTATIONS,
    *SEQUENCE_MUTATIONS,
    *TRAINER_MUTATIONS,
    *USER_MUTATIONS,
)
