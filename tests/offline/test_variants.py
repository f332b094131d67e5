"""How much a whole U-Net compiles, and that a new resolution or batch size compiles nothing."""

import pytest

import model_forward
import offline
from fastunet import dry_run

pytestmark = pytest.mark.proof  # three U-Nets compiled

# (batch, height, width) of the latent image: an eighth of 512, 768 and 1024 pixels, and others that
# NHWC reads as widely. SD 1.5 halves a side three times, SDXL twice.
SWEEP = [(1, 64, 64), (2, 96, 96), (8, 128, 128), (4, 96, 128)]
NHWC = [(1, 72, 72), (1, 104, 104), (2, 104, 136)]
NON_SQUARE = [(1, 72, 128)]


@pytest.mark.parametrize(
    ("model", "channels_last", "others"),
    [("sd15", False, []), ("sd15", True, NHWC), ("sdxl", False, NON_SQUARE)],
    ids=["sd15-nchw", "sd15-nhwc", "sdxl-nchw"],
)
def test_few_variants_and_a_new_size_compiles_nothing(model, channels_last, others):
    unet = dry_run.unet(model_forward.CONFIGS[model], channels_last=channels_last)
    with offline.target("sm_90") as launches:
        seconds = model_forward.compile_seconds(unet)
        # `make targets` holds both models to 20 seconds; here a slower machine may pass.
        assert seconds < 3 * model_forward.MOST_SECONDS
        dry_run.forward(unet, batch=2, height=64, width=64)
        assert len(launches.compilations) == len(launches.variants())
        known = {compiled.hash for compiled in launches.variants()}
        assert 0 < len(known) <= model_forward.MOST_VARIANTS
        for sizes in SWEEP + others:
            launches.clear()
            dry_run.forward(unet, *sizes)
            new = {launch.kernel for launch in launches if launch.compiled.hash not in known}
            assert launches and not new, (sizes, new)
