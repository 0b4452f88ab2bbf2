"""Published calibrations, as data: TeaCache's polynomials and MagCache's magnitude ratios, by model.

Sources: the authors' repositories, ali-vilab/TeaCache and Zehong-Ma/MagCache.
"""

from __future__ import annotations

# Highest power first; the argument is the relative L1 change of the modulated input.
TEA_POLYNOMIALS: dict[str, tuple[float, ...]] = {
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan_video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "wan2.1_1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1_14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1_1.3b_ret_steps": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "wan2.1_14b_ret_steps": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
}

# mean |residual of a step| / |residual of the step before|, one for each step of a run.
MAG_RATIOS: dict[str, tuple[float, ...]] = {
    "flux": (
        *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125),
        *(1.02344, 0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0),
        *(0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062),
    ),
}
