"""What usually makes a golden case fail, most likely first: the traps of SPEC.md by call."""

from spec.config import Config
from spec.params import find_block

SCHEDULE = (
    "tables built in float32 instead of float64 (1 - alphas_cumprod is then off by 1e-4 at t=0)",
    "one beta endpoint left out, T+1 points between them, or their roots spaced evenly",
    "cosine betas not capped at 0.999, or the offset 0.008 left out",
    "alphas_cumprod_prev does not start with 1",
    "a posterior table with betas, alphas or alphas_cumprod in another's place, or without a root",
    "sqrt_alphas_cumprod and sqrt_one_minus_alphas_cumprod swapped",
)
CALLS: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULE,
    "q_sample": (
        "sqrt_alphas_cumprod and sqrt_one_minus_alphas_cumprod swapped",
        "t gathered along the wrong axis, or one t used for all rows",
        "tables built in float32 instead of float64",
        "variance used where its square root belongs",
        "H and W exchanged on the way in or out",
    ),
    "target": (
        "v with its two terms swapped, or with a plus sign",
        "prediction ignored: the noise returned for every kind",
        "t gathered along the wrong axis, or one t used for all rows",
    ),
    "predict_x0_eps": (
        "clip missing, or applied although the config turns it off",
        "eps not derived again from the clipped x0",
        "x0 and eps read with the wrong formula for this prediction",
        "t gathered along the wrong axis, or one t used for all rows",
        "x0 clipped to [0, 1] instead of [-1, 1]",
    ),
    "ddpm_step": (
        "noise added at t=0, or the logarithm of 0 taken there",
        "posterior_variance and betas swapped (variance small and large)",
        "variance used where its square root belongs",
        "clip missing, or applied although the config turns it off",
        "posterior_mean_coef1 and posterior_mean_coef2 swapped",
        "t gathered along the wrong axis, or one t used for all rows",
    ),
    "ddim_step": (
        "the end taken as alphas_cumprod[0], or as [-1], which is the last, instead of 1",
        "eta ignored, or applied to the variance instead of to sigma",
        "sigma^2 left out of the eps term, or sigma without alphas_cumprod / alphas_cumprod_prev",
        "eps not derived again from the clipped x0",
        "t_prev taken as t-1, or alphas_cumprod_prev read at t_prev instead of t_prev+1",
        "step coefficients computed in float32",
    ),
    "guide": (
        "guidance as label + s*(label - null) instead of null + s*(label - null)",
        "null and label swapped",
        "a Python scalar, the guidance scale, frozen when the function was traced",
    ),
    "predict": (
        "a block differs: see the taps of this config",
        "skips concatenated in the wrong order, or [skip, hidden] for [hidden, skip]",
        "a skip kept before the attention, a block used twice, or a block left out",
        "null class is 0 or K-1 instead of K",
    ),
    "taps": (
        "the first block that differs is wrong: see its own L2 case",
        "a tap recorded before the residual sum, or in the wrong layout",
        "skips concatenated in the wrong order, or [skip, hidden] for [hidden, skip]",
        "a skip kept before the attention, a block used twice, or a block left out",
    ),
    "loss_and_grads": (
        "loss summed, or averaged over the batch only, instead of over all elements",
        "gradients not zeroed between calls",
        "dropout mask inverted, ignored, or drawn once for the batch",
        "null class is 0 or K-1 instead of K: dropped labels made class 0 or K-1",
        "a forward fault: see L3",
        "the mean or variance of GroupNorm taken as constant in the backward",
        "softmax differentiated over the wrong axis, or as if its outputs did not sum to 1",
        "no gradient through a skip, the embedding or the attention",
        "a gradient overwritten where several are to be summed",
        "another loss than the square, its factor 2 left out, or a wrong derivative of a layer",
    ),
    "apply_gradients": (
        "Adam's epsilon inside the root, on v without its bias correction (Keras), or 1e-7",
        "Adam's step counted from 0 instead of 1, or bias correction left out",
        "clip by g*min(1, c/(norm + 1e-6)), per tensor, per number, left out, or scaling small "
        "gradients up",
        "warm-up off by one step, or left out",
        "EMA before the update, without min(ema_decay, (1+k)/(10+k)), or with k counted from 1",
        "a Python scalar (the step count, the learning rate) frozen when the step was traced",
        "m, v, EMA or the step not carried over, one array for two, or begun elsewhere than at 0",
        "weight decay, or other betas than 0.9 and 0.999",
        "1 - beta^k, the step count or the EMA's decay computed in float32, which loses digits",
    ),
    "train_steps": (
        "a fault in the gradients or the update: see L4 and apply_gradients",
        "gradients not zeroed between steps",
        "EMA taken before the update",
        "a Python scalar (the step count, the learning rate) frozen when the step was traced",
        "arrays aliased, and changed in place",
    ),
    "train_run": (
        "a fault in a single step: see L5",
        "arithmetic that loses digits as steps go on: the step count or the EMA's decay in a low "
        "precision",
        "state that is not carried from step to step, or carried twice",
        "samples drawn with the parameters instead of their EMA",
    ),
}
BLOCKS: dict[str, tuple[str, ...]] = {
    "time_proj": (
        "cos before sin",
        "half in place of half-1 in the exponent",
        "t or the angles in low precision",
    ),
    "emb": (
        "time_proj wrong: see its own case",
        "null class is 0 or K-1 instead of K",
        "SiLU missing between the two linears, or added after the second",
        "the label's embedding added before the linears, between them, or not at all",
        "weights of linears transposed",
    ),
    "conv": (
        "kernel layout transposed (HWIO for OIHW), or kernel flipped",
        "input and output channels swapped",
        "padded by the edge or its reflection instead of zeros",
        "values rounded on the way: TF32 left on for float32, or half precision",
    ),
    "resnet": (
        "GroupNorm epsilon 1e-5 (torch's default) or 1e-3 (Keras') instead of 1e-6",
        "one-pass variance (Flax's default, torch's on channels_last memory), or an unbiased one",
        "groups interleaved instead of contiguous, or statistics over the batch",
        "epsilon added outside the root",
        "SiLU missing before time_emb_proj, or emb added after norm2",
        "kernel layout transposed, or kernel flipped",
        "the shortcut taken from the normalised input",
        "values rounded on the way: TF32 left on for float32, or half precision",
    ),
    "attention": (
        "scale 1/C instead of 1/sqrt(C), or none",
        "softmax over queries instead of keys, queries and keys swapped, or several heads",
        "residual left out, or from the normalised input instead of the raw one",
        "H and W flattened in the wrong order",
        "weights of linears transposed",
        "values rounded on the way: TF32 left on for float32, or half precision",
        "GroupNorm epsilon 1e-5 (torch's default) or 1e-3 (Keras') instead of 1e-6",
        "one-pass variance (Flax's default, torch's on channels_last memory), or an unbiased one",
    ),
    "downsample": (
        "zeros on all four sides, padding (1, 1), instead of one row below and one column right",
        "kernel layout transposed, or kernel flipped",
    ),
    "upsample": (
        "pixels tiled (abab) instead of repeated (aabb)",
        "bilinear instead of nearest",
        "kernel layout transposed, or kernel flipped",
    ),
    "conv_out": (
        "GroupNorm epsilon 1e-5 (torch's default) or 1e-3 (Keras') instead of 1e-6",
        "one-pass variance (Flax's default, torch's on channels_last memory), or an unbiased one",
        "SiLU missing before the last convolution",
    ),
}
REUSED = "a reused random key, or noise not advanced from step to step"
FROZEN = "a Python scalar, eta or the guidance scale, frozen when the sampler was traced"
DDPM = (
    "noise added at t=0",
    "variance small and large swapped",
    "times not from T-1 down to 0",
    REUSED,
)
DDIM = (
    "DDIM times off by one: never at T-1, or ending at alphas_cumprod[0] instead of 1",
    "eta or sigma wrong: see the ddim_step cases",
    "step coefficients computed in float32 (NaN where alphas_cumprod almost vanishes)",
    REUSED,
    FROZEN,
)
DPMPP = (
    "r inverted, or the half left out of 1/(2r)",
    "second order in the first or the last step, or in neither",
    "x0 of the step before not carried, or taken before the clip",
    "lambda with alphas_cumprod in place of its root, without the logarithm, or in float32",
    "times off by one: never at T-1, or ending at alphas_cumprod[0] instead of 1",
    "the clip ignored, or eps taken where x0 belongs",
)
GUIDED = (
    "guidance as label + s*(label - null), or applied after the clip",
    "a scale of 0 taken for no guidance: it asks for the null label's output",
    "null class is 0 or K-1 instead of K",
    "null and label swapped in the doubled batch",
    FROZEN,
)


def causes_of(call: str, options: dict, config: Config) -> tuple[str, ...]:
    """Likely causes of one case's failure."""
    if call == "run_block":
        kind = find_block(config, options["name"]).kind
        return BLOCKS.get(kind, BLOCKS["conv"])
    if call == "sample":
        guided = GUIDED if options.get("guidance_scale") is not None else ()
        methods = {"ddpm": DDPM, "ddim": DDIM, "dpmpp": DPMPP}
        return tuple(dict.fromkeys((*methods[options["method"]], *guided)))  # each cause once
    if call == "schedule":
        kept = (2, 0, 3, 4, 5) if config.schedule == "cosine" else (0, 1, 3, 4, 5)
        return tuple(SCHEDULE[i] for i in kept)
    return CALLS[call]
