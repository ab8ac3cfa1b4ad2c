// Quantizing activations and the gate functions: csrc/cpu/quantize.inc and elementwise.inc, one element at a
// time.
#pragma once

#include "cuda/portable.h"

namespace moe::cuda {

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to even

enum class ActivationKind : int { SILU, GELU_TANH, GELU_ERF, RELU, GPT_OSS_SWIGLU };

struct Activation {
    ActivationKind kind;
    float alpha;
    float limit;
};

MOE_HD float finite_magnitude(float x) {
    const uint32_t magnitude = as_bits(x) & 0x7fffffffu;
    return magnitude < 0x7f800000u ? as_float(magnitude) : 0.0f;
}

// 127 / amax, or 0 for a block of zeros.
MOE_HD float inverse_of(float amax) {
    return amax > 0.0f ? divide_rn(127.0f, amax) : 0.0f;
}

MOE_HD int8_t quantize_one(float x, float inverse) {
    float value = x * inverse;
    value = value == value ? value : 0.0f;
    value = value < 127.0f ? value : 127.0f;
    value = value > -127.0f ? value : -127.0f;
    return int8_t((value + kRoundMagic) - kRoundMagic);
}

MOE_HD float exp_f32(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = fma_rn(x, 0x1.715476p+0f, kRoundMagic);
    const float n = shifted - kRoundMagic;
    float r = fma_rn(n, -0x1.62e400p-1f, x);
    r = fma_rn(n, -0x1.7f7d1cp-20f, r);
    float p = 1.0f / 5040.0f;
    p = fma_rn(p, r, 1.0f / 720.0f);
    p = fma_rn(p, r, 1.0f / 120.0f);
    p = fma_rn(p, r, 1.0f / 24.0f);
    p = fma_rn(p, r, 1.0f / 6.0f);
    p = fma_rn(p, r, 0.5f);
    p = fma_rn(p, r, 1.0f);
    p = fma_rn(p, r, 1.0f);
    const int32_t exponent = int32_t(as_bits(shifted) - as_bits(kRoundMagic));
    const int32_t half = exponent >> 1;
    const float first = as_float(uint32_t(half + 127) << 23);
    const float second = as_float(uint32_t(exponent - half + 127) << 23);
    return p * first * second;
}

MOE_HD float sigmoid(float x) {
    return divide_rn(1.0f, 1.0f + exp_f32(-x));
}

MOE_HD float erfc_f32(float z, float z_squared) {
    const float t = divide_rn(1.0f, fma_rn(0.5f, z, 1.0f));
    const float kP[11] = {0.2820895314216614f,     0.28222835063934326f,  0.24542570114135742f,
                          0.18416385352611542f,    0.06009631231427193f,  0.022883804515004158f,
                          -0.0018787282751873136f, -0.31090450286865234f, 0.39578524231910706f,
                          -0.1966012865304947f,    0.03671173006296158f};
    float p = kP[10];
    for (int i = 9; i >= 0; --i) p = fma_rn(p, t, kP[i]);
    return exp_f32(-z_squared) * (t * p);
}

MOE_HD float gelu_tanh(float gate, float up) {
    const float cubic = fma_rn(0.044715f * gate * gate, gate, gate);
    return gate * sigmoid(1.5957691216057308f * cubic) * up;
}

MOE_HD float gelu_erf(float gate, float up) {
    const float magnitude = gate < 0.0f ? -gate : gate;
    const float tail = 0.5f * erfc_f32(magnitude * 0.70710678118654752f, (0.5f * gate) * gate);
    return gate * (gate < 0.0f ? tail : 1.0f - tail) * up;
}

MOE_HD float gpt_oss_swiglu(float gate, float up, const Activation& a) {
    gate = gate > a.limit ? a.limit : gate;
    up = up > a.limit ? a.limit : up;
    up = up < -a.limit ? -a.limit : up;
    return (up + 1.0f) * (gate * sigmoid(a.alpha * gate));
}

MOE_HD float activate(const Activation& a, float gate, float up) {
    switch (a.kind) {
        case ActivationKind::SILU:
            return gate * sigmoid(gate) * up;
        case ActivationKind::GELU_TANH:
            return gelu_tanh(gate, up);
        case ActivationKind::GELU_ERF:
            return gelu_erf(gate, up);
        case ActivationKind::RELU:
            return (gate > 0.0f ? gate : 0.0f) * up;
        case ActivationKind::GPT_OSS_SWIGLU:
            return gpt_oss_swiglu(gate, up, a);
    }
    return 0.0f;
}

}  // namespace moe::cuda
