// The kernels at one level of instructions; setup.py compiles this file once a level, with the level's name
// in SSMOE_LEVEL (Portable, Avx2, Avx512, Avx512Bf16) and its flags.
#include "attend.h"
#include "conv.h"
#include "dense.h"
#include "experts.h"
#include "mamba_step.h"
#include "norm.h"
#include "scan.h"
#include "skinny.h"
#include "softmax.h"

#define SSMOE_TEXT_(x) #x
#define SSMOE_TEXT(x) SSMOE_TEXT_(x)
#define SSMOE_JOIN_(a, b) a##b
#define SSMOE_JOIN(a, b) SSMOE_JOIN_(a, b)
#define SSMOE_EACH(f) {f<float>, f<bfloat16>, f<double>}

namespace ssmoe {

extern const Kernels SSMOE_JOIN(k, SSMOE_LEVEL);
const Kernels SSMOE_JOIN(k, SSMOE_LEVEL) = {
    SSMOE_TEXT(SSMOE_LEVEL),
    {kLanes<float>, kLanes<float>, kLanes<double>},
    SSMOE_EACH(::dense_block),
    SSMOE_EACH(::dense_scratch),
    SSMOE_EACH(::softmax_rows),
    SSMOE_EACH(::norm_rows),
    SSMOE_EACH(::norm_backward),
    SSMOE_EACH(::scan_forward),
    SSMOE_EACH(::scan_backward),
    SSMOE_EACH(::conv_forward),
    SSMOE_EACH(::conv_backward),
    SSMOE_EACH(::expert_forward),
    SSMOE_EACH(::expert_backward),
    SSMOE_EACH(::expert_gradients),
    SSMOE_EACH(::expert_scratch),
    SSMOE_EACH(::combine),
    SSMOE_EACH(::activate),
    {kPacked<float>, kPacked<bfloat16>, kPacked<double>},
    SSMOE_EACH(::pack_vectors),
    SSMOE_EACH(::skinny),
    SSMOE_EACH(::attend_pieces),
    SSMOE_EACH(::attend_join),
    SSMOE_EACH(::step_norm),
    SSMOE_EACH(::step_in),
    SSMOE_EACH(::step_parts),
    SSMOE_EACH(::step_scan),
    SSMOE_EACH(::step_out),
};

}  // namespace ssmoe
