// SPDX-License-Identifier: Apache-2.0
// int8 x int8 with a float32 scale per token and per output channel, float16 out, for Hopper, out of CUTLASS 3 parts.
// Compiled with -DCONFIG=i into one library each, so that the configurations can be compiled side by side.
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

using namespace cute;

struct Cooperative {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

struct Pingpong {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// The product of a left [rows, K] and a right [columns, K] operand. Transposed: the weight is the left operand, so
// that few tokens fill the narrow side of a tile; the result is then stored by columns.
template <class Tile, class Cluster, class Schedule, bool IsTransposed, class Scheduler = void>
struct Scaled8 {
  using Output = cutlass::half_t;
  using OutputLayout = std::conditional_t<IsTransposed, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using LeftScale = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float>;
  using RightScale = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>;
  template <class To>
  using Multiply = cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, To, float,
                                                          cutlass::FloatRoundStyle::round_to_nearest>;
  using ScaledRight = cutlass::epilogue::fusion::Sm90EVT<Multiply<float>, RightScale,
                                                         cutlass::epilogue::fusion::Sm90AccFetch>;
  using Result = cutlass::epilogue::fusion::Sm90EVT<Multiply<Output>, LeftScale, ScaledRight>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, OutputLayout, 8, Output, OutputLayout, 8,
      typename Schedule::Epilogue, Result>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Gemm::Arguments arguments(const int8_t* tokens, const int8_t* weight, Output* out,
                                            const float* token_scale, const float* channel_scale, int m, int n, int k,
                                            int processors) {
    const int rows = IsTransposed ? n : m;
    const int columns = IsTransposed ? m : n;
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {rows, columns, k, 1};
    args.mainloop.ptr_A = IsTransposed ? weight : tokens;
    args.mainloop.dA = {k, _1{}, 0};
    args.mainloop.ptr_B = IsTransposed ? tokens : weight;
    args.mainloop.dB = {k, _1{}, 0};
    args.epilogue.thread = {{IsTransposed ? channel_scale : token_scale},
                            {{IsTransposed ? token_scale : channel_scale}, {}, {}},
                            {}};
    args.epilogue.ptr_D = out;
    if constexpr (IsTransposed) {
      args.epilogue.dD = {_1{}, rows, 0};
    } else {
      args.epilogue.dD = {columns, _1{}, 0};
    }
    args.hw_info.sm_count = processors;
    return args;
  }
};

#if CONFIG == 0
using Chosen = Scaled8<Shape<_64, _16, _256>, Shape<_1, _1, _1>, Pingpong, true>;
#elif CONFIG == 1
using Chosen = Scaled8<Shape<_128, _32, _128>, Shape<_1, _1, _1>, Cooperative, true, cutlass::gemm::StreamKScheduler>;
#elif CONFIG == 2
using Chosen = Scaled8<Shape<_128, _64, _128>, Shape<_1, _1, _1>, Pingpong, true>;
#elif CONFIG == 3
using Chosen = Scaled8<Shape<_64, _128, _128>, Shape<_2, _1, _1>, Pingpong, false>;
#elif CONFIG == 4
using Chosen = Scaled8<Shape<_128, _128, _128>, Shape<_2, _1, _1>, Pingpong, false>;
#elif CONFIG == 5
using Chosen = Scaled8<Shape<_128, _128, _128>, Shape<_1, _2, _1>, Cooperative, true, cutlass::gemm::StreamKScheduler>;
#elif CONFIG == 6
using Chosen = Scaled8<Shape<_128, _256, _128>, Shape<_2, _1, _1>, Cooperative, false>;
#else
#error "CONFIG is the number of a configuration above"
#endif

// Bytes of workspace that a product of this size needs; negative when the configuration cannot compute it.
extern "C" long long workspace_bytes(int m, int n, int k, int processors) {
  const auto args = Chosen::arguments(nullptr, nullptr, nullptr, nullptr, nullptr, m, n, k, processors);
  if (Chosen::Gemm::can_implement(args) != cutlass::Status::kSuccess) return -1;
  return static_cast<long long>(Chosen::Gemm::get_workspace_size(args));
}

extern "C" int run(const void* tokens, const void* weight, void* out, const void* token_scale,
                   const void* channel_scale, void* workspace, int m, int n, int k, int processors, void* stream) {
  const auto args = Chosen::arguments(
      static_cast<const int8_t*>(tokens), static_cast<const int8_t*>(weight), static_cast<cutlass::half_t*>(out),
      static_cast<const float*>(token_scale), static_cast<const float*>(channel_scale), m, n, k, processors);
  typename Chosen::Gemm gemm;
  return static_cast<int>(gemm.run(args, workspace, static_cast<cudaStream_t>(stream)));
}
