// The Python module pylumiere._runtime: the only file that knows Python. Arrays cross as DLPack or buffers, without a
// copy; the GIL is released around everything that computes or waits.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <new>

#include "lumiere/bounded_queue.hpp"
#include "lumiere/convert.hpp"
#include "lumiere/denoise_step.hpp"
#include "lumiere/attention.hpp"
#include "lumiere/group_norm.hpp"
#include "lumiere/sampler.hpp"
#include "lumiere/wavefront.hpp"
#include "lumiere/window_plan.hpp"

#ifdef LUMIERE_CUDA
#include "lumiere/denoise_step_cuda.hpp"
#endif

namespace nb = nanobind;
using namespace nb::literals;
using namespace lumiere;

namespace {

template <typename T, typename... Shape>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu, Shape...>;
using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
template <typename T>
using NumpyArray = nb::ndarray<nb::numpy, T, nb::c_contig>;

void require(bool condition, const std::string& text) {
  if (!condition) throw std::invalid_argument(text);
}

// A new numpy array that owns `values`.
template <typename T>
NumpyArray<T> to_numpy(std::vector<T> values, std::initializer_list<std::size_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return NumpyArray<T>(owned->data(), shape, owner);
}

ElementType element_type(const nb::dlpack::dtype& dtype) {
  const auto code = static_cast<nb::dlpack::dtype_code>(dtype.code);
  if (dtype.lanes == 1 && code == nb::dlpack::dtype_code::Float && dtype.bits == 32) return ElementType::float32;
  if (dtype.lanes == 1 && code == nb::dlpack::dtype_code::Float && dtype.bits == 16) return ElementType::float16;
  if (dtype.lanes == 1 && code == nb::dlpack::dtype_code::Bfloat && dtype.bits == 16) return ElementType::bfloat16;
  throw nb::type_error("the output must be float32, bfloat16 or float16");
}

const InnerLoops& loops_at(std::optional<int> index) {
  if (!index) return inner_loops();
  const InnerLoops* loops = inner_loops_by_index(*index);
  require(loops != nullptr, "instruction set " + std::to_string(*index) + " does not run on this processor");
  return *loops;
}

NumpyArray<std::int64_t> tasks_to_numpy(std::span<const Task> tasks) {
  std::vector<std::int64_t> values;
  values.reserve(tasks.size() * 3);
  for (const Task& task : tasks) values.insert(values.end(), {task.clip, task.window, task.step});
  return to_numpy(std::move(values), {tasks.size(), 3});
}

NumpyArray<std::int64_t> fresh_to_numpy(std::span<const FreshFrame> fresh) {
  std::vector<std::int64_t> values;
  for (const FreshFrame& f : fresh) values.insert(values.end(), {f.clip, f.frame, f.slot});
  return to_numpy(std::move(values), {fresh.size(), 3});
}

// A wavefront whose frames live elsewhere, on a GPU say: tasks, slots and rows as arrays.
struct PyWavefront {
  Wavefront wavefront;
  std::vector<Task> tasks;
  std::vector<FreshFrame> fresh;
  Completion completion;

  nb::tuple next(int capacity) {
    require(tasks.empty(), "the batch before has not been completed");
    wavefront.next(capacity, tasks, fresh);
    return nb::make_tuple(tasks_to_numpy(tasks), fresh_to_numpy(fresh));
  }

  // Of the batch that `next` gave: the frame at each position of each task's call, and its slot.
  nb::tuple reads() const {
    std::vector<std::int64_t> frames;
    std::vector<std::int32_t> slots;
    std::size_t length = 0;
    for (const Task& task : tasks) {
      const WindowPlan& plan = wavefront.plan(task.clip);
      length = static_cast<std::size_t>(plan.call_frames());
      for (int i = 0; i < plan.call_frames(); ++i) {
        frames.push_back(plan.frame_at(task.window, i));
        slots.push_back(wavefront.slot(task.clip, frames.back()));
      }
    }
    return nb::make_tuple(to_numpy(std::move(frames), {tasks.size(), length}),
                          to_numpy(std::move(slots), {tasks.size(), length}));
  }

  nb::tuple complete(int max_writers) {
    wavefront.complete(tasks, completion);
    tasks.clear();
    const std::size_t n = completion.steps.size(), k_max = static_cast<std::size_t>(max_writers);
    std::vector<std::int64_t> steps, kept;
    std::vector<std::int32_t> rows(n * k_max, INT32_MIN);
    std::vector<float> weights(n * k_max, 0.0f);
    steps.reserve(n * 4);
    for (std::size_t i = 0; i < n; ++i) {
      const FrameStep& s = completion.steps[i];
      require(s.num_sources <= max_writers, "max_writers=" + std::to_string(max_writers) + " is less than the plan's");
      steps.insert(steps.end(), {s.clip, s.frame, s.step, s.slot});
      for (int k = 0; k < s.num_sources; ++k) {
        const Source& source = completion.sources[static_cast<std::size_t>(s.first_source + k)];
        rows[i * k_max + k] = source.row;
        weights[i * k_max + k] = source.weight;
      }
    }
    for (const KeptRow& k : completion.kept) kept.insert(kept.end(), {k.clip, k.call_row, k.kept_row});
    return nb::make_tuple(to_numpy(std::move(steps), {n, 4}), to_numpy(std::move(rows), {n, k_max}),
                          to_numpy(std::move(weights), {n, k_max}), to_numpy(std::move(kept), {completion.kept.size(), 3}));
  }
};

// Python objects in a queue. The queue's lock is never held while a reference count changes.
class FrameQueue {
 public:
  explicit FrameQueue(std::size_t capacity) : queue_(capacity) {}
  ~FrameQueue() { cancel(); }

  bool put(nb::object item) {
    PyObject* raw = item.release().ptr();
    bool taken;
    {
      nb::gil_scoped_release release;
      taken = queue_.put(raw);
    }
    if (!taken) Py_DECREF(raw);
    return taken;
  }

  // (item,) or an empty tuple at the end: any object may be an item.
  nb::tuple get() {
    std::optional<PyObject*> raw;
    {
      nb::gil_scoped_release release;
      raw = queue_.get();
    }
    if (!raw) return nb::make_tuple();
    return nb::make_tuple(nb::steal<nb::object>(*raw));
  }

  void finish() { queue_.finish(); }
  void cancel() {
    for (PyObject* item : queue_.cancel()) Py_DECREF(item);
  }
  std::size_t size() const { return queue_.size(); }
  std::size_t capacity() const { return queue_.capacity(); }

 private:
  BoundedQueue<PyObject*> queue_;
};

void denoise_step(Array<const float, nb::ndim<2>> x, std::optional<Array<const float, nb::ndim<2>>> x0_prev, AnyArray out,
                  Array<const std::int32_t, nb::ndim<2>> rows, Array<const float, nb::ndim<2>> weights,
                  Array<const float, nb::shape<-1, 10>> coef, Array<const std::int64_t, nb::shape<-1, 5>> key,
                  Array<float, nb::ndim<2>> x_next, Array<float, nb::ndim<2>> x0, ThreadPool& pool,
                  std::optional<int> instruction_set) {
  const std::size_t num_frames = x.shape(0), values = x.shape(1), num_windows = rows.shape(1);
  require(out.ndim() == 3 && out.shape(2) == values && (out.shape(0) == 1 || out.shape(0) == 2),
          "out must be [1 or 2, rows, values] with the values of x");
  const auto same = [&](const auto& a) { return a.shape(0) == num_frames && a.shape(1) == values; };
  require(same(x_next) && same(x0) && (!x0_prev || same(*x0_prev)), "x, x0_prev, x_next and x0 differ in shape");
  require(rows.shape(0) == num_frames && weights.shape(0) == num_frames && weights.shape(1) == num_windows &&
              coef.shape(0) == num_frames && key.shape(0) == num_frames,
          "rows, weights, coef and key must have one row a frame");
  const ElementType type = element_type(out.dtype());
  const std::int64_t row_bytes = static_cast<std::int64_t>(values) * element_bytes(type);
  const std::int64_t output_bytes = static_cast<std::int64_t>(out.shape(1)) * row_bytes;
  const char* base = static_cast<const char*>(out.data());

  std::vector<Output> outputs;
  outputs.reserve(num_frames * num_windows);
  std::vector<StepPart> parts;
  for (std::size_t f = 0; f < num_frames; ++f) {
    const Output* first = outputs.data() + outputs.size();
    int count = 0;
    for (std::size_t k = 0; k < num_windows; ++k) {
      const std::int32_t row = rows(f, k);
      if (row == -1) continue;
      require(row >= 0 && static_cast<std::size_t>(row) < out.shape(1), "row " + std::to_string(row) + " is not in out");
      const char* cond = base + row * row_bytes;
      outputs.push_back({cond, out.shape(0) == 2 ? cond + output_bytes : nullptr, weights(f, k)});
      ++count;
    }
    const float* c = coef.data() + f * 10;
    const std::int64_t* k = key.data() + f * 5;
    parts.push_back({x.data() + f * values, x0_prev ? x0_prev->data() + f * values : nullptr, x_next.data() + f * values,
                     x0.data() + f * values, first, count, type,
                     {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9]},
                     {static_cast<std::uint64_t>(k[0]), static_cast<std::uint32_t>(k[1]), static_cast<std::int32_t>(k[2]), k[3]},
                     0, static_cast<std::int64_t>(values)});
  }
  nb::gil_scoped_release release;
  denoise_frames(parts, pool, loops_at(instruction_set));
}

}  // namespace

NB_MODULE(_runtime, m) {
  m.doc() = "C++ core of pylumiere: temporal windows, wavefront, frame states, the sampler step on CPU.";
#ifdef LUMIERE_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("instruction_set", [] { return std::string(inner_loops().name); },
        "The instruction set that the inner loops use here: baseline, avx2 or avx512.");
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (int i = 0; i < num_inner_loops(); ++i) {
      if (const InnerLoops* loops = inner_loops_by_index(i)) names.emplace_back(loops->name);
    }
    return names;
  }, "Those that this processor runs; their index is what `instruction_set` arguments take.");
  m.def("default_num_threads", &default_num_threads, "Cores that this process may use.");

  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const NonFiniteOutput& e) {
      nb::object error = nb::module_::import_("pylumiere.diffusion.windows").attr("NonFiniteOutput")(
          e.what(), e.task.clip, static_cast<std::int64_t>(e.stage), e.task.step, e.task.window);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    }
  });

  // Addresses instead of arrays: this runs a hundred times in a network call, and a DLPack argument costs a microsecond.
  m.def("attention",
        [](std::array<std::uintptr_t, 4> addresses, std::array<std::int64_t, 8> strides, bool is_bfloat16,
           std::int64_t sequences, std::int64_t heads, std::int64_t queries, std::int64_t keys, std::int64_t head_dim,
           float scale, std::uintptr_t mask, std::uintptr_t parallel, int num_threads,
           std::optional<int> instruction_set) {
          require(sequences > 0 && heads > 0 && queries > 0 && keys > 0, "sizes must be positive");
          require(has_attention(head_dim), "head_dim=" + std::to_string(head_dim) + " is not 16, 32 or 64");
          loops_at(instruction_set);
          const auto rows = [&](std::size_t i) { return Rows{addresses[i], strides[2 * i], strides[2 * i + 1]}; };
          const Attention call{rows(0), rows(1), rows(2), rows(3), is_bfloat16 ? ElementType::bfloat16 : ElementType::float32,
                               sequences, heads, queries, keys, head_dim, scale, reinterpret_cast<const bool*>(mask)};
          nb::gil_scoped_release release;
          attention(call, instruction_set ? attention_part_by_index(*instruction_set) : attention_part(),
                    reinterpret_cast<ParallelRegion>(parallel), num_threads);
        },
        "addresses"_a, "strides"_a, "is_bfloat16"_a, "sequences"_a, "heads"_a, "queries"_a, "keys"_a, "head_dim"_a,
        "scale"_a, "mask"_a, "parallel"_a, "num_threads"_a, "instruction_set"_a = nb::none(),
        "Attention on memory at addresses of q, k, v, out, with their strides by sequence and row; see "
        "lumiere/attention.hpp. 0 is null.");
  m.def("group_norm",
        [](std::uintptr_t x, std::uintptr_t y, bool is_bfloat16, std::int64_t frames, std::int64_t pixels,
           std::int64_t channels, std::int64_t groups, float eps, std::uintptr_t weight, std::uintptr_t bias,
           std::uintptr_t scale, std::uintptr_t shift, std::int64_t frames_per_row, std::int64_t row_stride, bool silu,
           std::uintptr_t parallel, int num_threads, std::optional<int> instruction_set) {
          require(frames > 0 && pixels > 0 && groups > 0 && channels > 0 && channels % groups == 0 && frames_per_row > 0,
                  "frames, pixels, groups and frames_per_row must be positive and groups must divide channels");
          loops_at(instruction_set);
          const auto pointer = [](std::uintptr_t address) { return reinterpret_cast<const void*>(address); };
          const GroupNorm call{pointer(x), reinterpret_cast<void*>(y),
                               is_bfloat16 ? ElementType::bfloat16 : ElementType::float32, frames, pixels, channels,
                               groups, eps, pointer(weight), pointer(bias), pointer(scale), pointer(shift),
                               frames_per_row, row_stride, silu};
          nb::gil_scoped_release release;
          group_norm(call, instruction_set ? group_norm_frame_by_index(*instruction_set) : group_norm_frame(),
                     reinterpret_cast<ParallelRegion>(parallel), num_threads);
        },
        "x"_a, "y"_a, "is_bfloat16"_a, "frames"_a, "pixels"_a, "channels"_a, "groups"_a, "eps"_a, "weight"_a, "bias"_a,
        "scale"_a, "shift"_a, "frames_per_row"_a, "row_stride"_a, "silu"_a, "parallel"_a, "num_threads"_a,
        "instruction_set"_a = nb::none(),
        "GroupNorm per frame, modulation and SiLU on memory at addresses; see lumiere/group_norm.hpp. 0 is null.");

  nb::class_<WindowPlan>(m, "WindowPlan")
      .def("__init__",
           [](WindowPlan* self, std::optional<std::int64_t> num_frames, int window, int overlap, const std::string& weights,
              bool loop, int halo, int multiple) {
             new (self) WindowPlan(num_frames, window, overlap, weight_shape_from_name(weights), loop, halo, multiple);
           },
           "num_frames"_a.none(), "window"_a, "overlap"_a, "weights"_a = "flat", "loop"_a = false, "halo"_a = 0, "multiple"_a = 1)
      .def_prop_ro("num_frames", [](const WindowPlan& p) -> std::optional<std::int64_t> {
        return p.has_length() ? std::optional(p.num_frames()) : std::nullopt;
      })
      .def_prop_ro("num_windows", [](const WindowPlan& p) -> std::optional<std::int64_t> {
        return p.has_length() ? std::optional(p.num_windows()) : std::nullopt;
      })
      .def_prop_ro("window", &WindowPlan::window)
      .def_prop_ro("overlap", &WindowPlan::overlap)
      .def_prop_ro("stride", &WindowPlan::stride)
      .def_prop_ro("halo", &WindowPlan::halo)
      .def_prop_ro("loop", &WindowPlan::loop)
      .def_prop_ro("call_frames", &WindowPlan::call_frames, "Frames of every denoiser call.")
      .def_prop_ro("max_writers", &WindowPlan::max_writers)
      .def("start", &WindowPlan::start, "window_index"_a)
      .def("frames", [](const WindowPlan& p, std::int64_t window) {
        std::vector<std::int64_t> frames;
        for (int i = 0; i < p.call_frames(); ++i) frames.push_back(p.frame_at(window, i));
        const std::size_t n = frames.size();
        return to_numpy(std::move(frames), {n});
      }, "window_index"_a, "int64 [call_frames]: the frame at each position of the window's call.")
      .def("written_position", &WindowPlan::written_position, "window_index"_a, "frame"_a)
      .def("writers", [](const WindowPlan& p, std::int64_t frame) {
        std::vector<std::int64_t> writers;
        p.writers(frame, writers);
        return writers;
      }, "frame"_a, "Windows that write the frame, ascending.")
      .def("readers", [](const WindowPlan& p, std::int64_t frame) {
        std::vector<std::int64_t> readers;
        p.readers(frame, readers);
        return readers;
      }, "frame"_a, "Windows that read the frame, ascending.")
      .def("weights", [](const WindowPlan& p, std::int64_t frame) {
        std::vector<std::int64_t> writers;
        std::vector<float> weights;
        p.writers(frame, writers);
        p.frame_weights(frame, writers, weights);
        const std::size_t n = weights.size();
        return to_numpy(std::move(weights), {n});
      }, "frame"_a, "Weights of the writers, in their order; they sum to one.")
      .def("buffer_sizes", [](const WindowPlan& p, int steps, int capacity) {
        const BufferSizes sizes = buffer_sizes(p, steps, capacity);
        return nb::make_tuple(sizes.slots(), sizes.rows);
      }, "steps"_a, "capacity"_a = 1, "(frame slots, kept output rows) of one clip.");

  nb::class_<PyWavefront>(m, "Wavefront")
      .def(nb::init<>())
      .def("add_clip", [](PyWavefront& w, const WindowPlan& plan, int steps, int capacity) {
        return w.wavefront.add_clip(plan, steps, capacity);
      }, "plan"_a, "steps"_a, "capacity"_a = 1)
      .def("remove_clip", [](PyWavefront& w, std::int64_t clip) { w.wavefront.remove_clip(clip); }, "clip"_a)
      .def("set_paused", [](PyWavefront& w, std::int64_t clip, bool paused) { w.wavefront.set_paused(clip, paused); },
           "clip"_a, "paused"_a)
      .def("extend", [](PyWavefront& w, std::int64_t clip, std::int64_t available, bool ended) {
        w.wavefront.extend(clip, available, ended);
      }, "clip"_a, "available"_a, "ended"_a)
      .def("next", &PyWavefront::next, "capacity"_a,
           "(tasks [N, 3]: clip, window, step; fresh [F, 3]: clip, frame, slot), int64.")
      .def("reads", &PyWavefront::reads,
           "Of the batch that `next` gave: (frames [N, L] int64, their slots [N, L] int32), by position in the call.")
      .def("complete", &PyWavefront::complete, "max_writers"_a,
           "Of the batch that `next` gave: (steps [F, 4] int64: clip, frame, step, slot; rows [F, K] int32, weights [F, K] "
           "fp32; kept [M, 3] int64: clip, call row, kept row). A row >= 0 is a kept row, -1 - r is row r of the call, "
           "the smallest int32 is none. Do the steps first, then copy the kept rows.")
      .def("released", [](PyWavefront& w, std::int64_t clip) { return w.wavefront.released(clip); }, "clip"_a)
      .def("final_end", [](PyWavefront& w, std::int64_t clip) { return w.wavefront.final_end(clip); }, "clip"_a)
      .def("release", [](PyWavefront& w, std::int64_t clip, std::int64_t count) { w.wavefront.release(clip, count); },
           "clip"_a, "count"_a)
      .def("plan", [](PyWavefront& w, std::int64_t clip) { return w.wavefront.plan(clip); }, "clip"_a)
      .def("slot", [](PyWavefront& w, std::int64_t clip, std::int64_t frame) { return w.wavefront.slot(clip, frame); },
           "clip"_a, "frame"_a)
      .def("is_finished", [](PyWavefront& w, std::int64_t clip) { return w.wavefront.is_finished(clip); }, "clip"_a)
      .def("first_needed", [](PyWavefront& w, std::int64_t clip) { return w.wavefront.first_needed(clip); }, "clip"_a)
      .def("frames_wanted", [](PyWavefront& w, std::int64_t clip, int capacity) {
        return w.wavefront.frames_wanted(clip, capacity);
      }, "clip"_a, "capacity"_a);

  nb::class_<Sampler>(m, "Sampler")
      .def("__init__", [](Sampler* self, std::int64_t frame_values, int num_outputs, int num_threads,
                          std::optional<int> instruction_set) {
        new (self) Sampler(frame_values, num_outputs, num_threads, &loops_at(instruction_set));
      }, "frame_values"_a, "num_outputs"_a, "num_threads"_a, "instruction_set"_a = nb::none())
      .def("add_clip",
           [](Sampler& s, const WindowPlan& plan, Array<const float, nb::shape<-1, 6>> table, std::uint64_t seed,
              std::uint32_t stage, float init_alpha, float init_sigma, float guidance, float clip, float rescale,
              double threshold, double threshold_max, bool has_initial, int capacity) {
             ClipSettings settings{seed, stage, {}, init_alpha, init_sigma, guidance, clip,
                                   {rescale, threshold, threshold_max}, has_initial};
             for (std::size_t i = 0; i < table.shape(0); ++i) {
               settings.table.push_back({table(i, 0), table(i, 1), table(i, 2), table(i, 3), table(i, 4), table(i, 5)});
             }
             return s.add_clip(plan, std::move(settings), capacity);
           },
           "plan"_a, "table"_a, "seed"_a, "stage"_a, "init_alpha"_a, "init_sigma"_a, "guidance"_a, "clip"_a, "rescale"_a,
           "threshold"_a, "threshold_max"_a, "has_initial"_a, "capacity"_a)
      .def("remove_clip", &Sampler::remove_clip, "clip"_a)
      .def("set_paused", &Sampler::set_paused, "clip"_a, "paused"_a)
      .def("extend", &Sampler::extend, "clip"_a, "available"_a, "ended"_a)
      .def("next", [](Sampler& s, int capacity) {
        std::span<const Task> tasks;
        {
          nb::gil_scoped_release release;
          tasks = s.next(capacity);
        }
        return nb::make_tuple(tasks_to_numpy(tasks), fresh_to_numpy(s.fresh()));
      }, "capacity"_a)
      .def("fill_initial", [](Sampler& s, std::int64_t index, Array<const float> clean) {
        require(index >= 0 && static_cast<std::size_t>(index) < s.fresh().size(), "no such fresh frame");
        require(static_cast<std::int64_t>(clean.size()) == s.frame_values(),
                "the initial frame has " + std::to_string(clean.size()) + " values, expected " + std::to_string(s.frame_values()));
        nb::gil_scoped_release release;
        s.fill_initial(s.fresh().subspan(static_cast<std::size_t>(index), 1), clean.data());
      }, "index"_a, "clean"_a)
      .def("gather", [](Sampler& s, Array<float> x, std::int64_t rows) {
        require(static_cast<std::int64_t>(x.size()) >= rows * s.frame_values(), "x is too small for the batch");
        nb::gil_scoped_release release;
        s.gather(x.data());
      }, "x"_a, "rows"_a)
      .def("complete", [](Sampler& s, AnyArray out, std::int64_t num_tasks) {
        const ElementType type = element_type(out.dtype());
        nb::gil_scoped_release release;
        s.complete(out.data(), type, num_tasks);
      }, "out"_a, "num_tasks"_a)
      .def("abandon", &Sampler::abandon)
      .def("take_final", [](Sampler& s, std::int64_t clip, Array<float> out) {
        const std::int64_t count = static_cast<std::int64_t>(out.size()) / s.frame_values();
        nb::gil_scoped_release release;
        return s.take_final(clip, count, out.data());
      }, "clip"_a, "out"_a)
      .def("num_final", [](const Sampler& s, std::int64_t clip) {
        return s.wavefront().final_end(clip) - s.wavefront().released(clip);
      }, "clip"_a)
      .def("final_end", [](const Sampler& s, std::int64_t clip) { return s.wavefront().final_end(clip); }, "clip"_a)
      .def("is_finished", [](const Sampler& s, std::int64_t clip) { return s.wavefront().is_finished(clip); }, "clip"_a)
      .def("first_needed", [](const Sampler& s, std::int64_t clip) { return s.wavefront().first_needed(clip); }, "clip"_a)
      .def("frames_wanted", [](const Sampler& s, std::int64_t clip, int capacity) {
        return s.wavefront().frames_wanted(clip, capacity);
      }, "clip"_a, "capacity"_a)
      .def("plan", [](const Sampler& s, std::int64_t clip) { return s.wavefront().plan(clip); }, "clip"_a)
      .def("clip_bytes", &Sampler::clip_bytes, "clip"_a)
      .def_prop_ro("pool", &Sampler::pool, nb::rv_policy::reference_internal);

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "num_threads"_a)
      .def_prop_ro("num_threads", &ThreadPool::num_threads);

  nb::class_<FrameQueue>(m, "FrameQueue")
      .def(nb::init<std::size_t>(), "capacity"_a)
      .def("put", &FrameQueue::put, "item"_a.none(), "Waits for room. False: cancelled or finished; stop producing.")
      .def("get", &FrameQueue::get, "Waits for an item: (item,), or () when the queue is finished and empty, or cancelled.")
      .def("finish", &FrameQueue::finish, "No more items; what is there can still be taken.")
      .def("cancel", &FrameQueue::cancel, "Drops what is there and wakes both sides.")
      .def("__len__", &FrameQueue::size)
      .def_prop_ro("capacity", &FrameQueue::capacity);

  m.def("denoise_step", &denoise_step, "x"_a, "x0_prev"_a.none(), "out"_a, "rows"_a, "weights"_a, "coef"_a, "key"_a,
        "x_next"_a, "x0"_a, "pool"_a, "instruction_set"_a = nb::none(),
        "The sampler step of kernels/denoise_step.py on CPU arrays: writes x_next (may be x) and x0 (may be x0_prev).");
#ifdef LUMIERE_CUDA
  using DeviceFloats = nb::ndarray<float, nb::c_contig, nb::device::cuda, nb::ndim<2>>;
  using DeviceInts = nb::ndarray<std::int32_t, nb::c_contig, nb::device::cuda, nb::ndim<1>>;
  m.def("denoise_step_cuda",
        [](DeviceFloats x, std::optional<DeviceFloats> x0_prev, nb::ndarray<nb::c_contig, nb::device::cuda, nb::ndim<3>> out,
           nb::ndarray<std::int32_t, nb::c_contig, nb::device::cuda, nb::ndim<2>> rows, DeviceFloats weights,
           nb::ndarray<float, nb::c_contig, nb::device::cuda, nb::shape<-1, 10>> coef,
           nb::ndarray<std::int64_t, nb::c_contig, nb::device::cuda, nb::shape<-1, 5>> key, DeviceFloats x_next,
           std::optional<DeviceFloats> x0, std::uintptr_t stream, std::optional<DeviceInts> slots,
           std::optional<nb::ndarray<nb::c_contig, nb::device::cuda, nb::ndim<3>>> kept, std::optional<DeviceInts> halt) {
          const std::size_t n = slots ? slots->shape(0) : x.shape(0), values = x.shape(1);
          const auto same = [&](const auto& a) { return a.shape(0) == x.shape(0) && a.shape(1) == values; };
          require(same(x_next) && (!x0 || same(*x0)) && (!x0_prev || same(*x0_prev)),
                  "x, x0_prev, x_next and x0 differ in shape");
          require(!kept || (kept->shape(0) == out.shape(0) && kept->shape(2) == values && kept->dtype() == out.dtype()),
                  "kept does not fit out");
          require(!halt || halt->shape(0) == 1, "halt must be one number");
          require(out.shape(2) == values && rows.shape(0) == n && weights.shape(0) == n &&
                      weights.shape(1) == rows.shape(1) && coef.shape(0) == n && key.shape(0) == n,
                  "out, rows, weights, coef or key do not fit x");
          const ElementType type = element_type(out.dtype());
          const OutType out_type = type == ElementType::float32   ? OutType::kFloat32
                                   : type == ElementType::float16 ? OutType::kFloat16
                                                                  : OutType::kBFloat16;
          const DenoiseStepArgs args{x.data(), x0_prev ? x0_prev->data() : nullptr, out.data(), rows.data(), weights.data(),
                                     coef.data(), key.data(), x_next.data(), x0 ? x0->data() : nullptr, static_cast<std::int64_t>(n),
                                     static_cast<std::int64_t>(values), static_cast<std::int64_t>(out.shape(1)),
                                     static_cast<std::int32_t>(rows.shape(1)), static_cast<std::int32_t>(out.shape(0)),
                                     slots ? slots->data() : nullptr, kept ? kept->data() : nullptr,
                                     kept ? static_cast<std::int64_t>(kept->shape(1)) : 0, halt ? halt->data() : nullptr};
          nb::gil_scoped_release release;
          denoise_step_on_stream(args, out_type, stream);
        },
        "x"_a, "x0_prev"_a.none(), "out"_a, "rows"_a, "weights"_a, "coef"_a, "key"_a, "x_next"_a, "x0"_a.none(), "stream"_a,
        "slots"_a = nb::none(), "kept"_a = nb::none(), "halt"_a = nb::none(),
        "denoise_step on CUDA arrays, enqueued on `stream` (an integer handle). Does not synchronise. With `slots` it is "
        "denoise_step_: x_next is x, and x0 is x0_prev.");
#endif
  m.def("frame_noise", [](Array<const std::int64_t, nb::shape<-1, 5>> key, Array<float, nb::ndim<2>> out, ThreadPool& pool,
                          std::optional<int> instruction_set) {
    require(key.shape(0) == out.shape(0), "key and out must have one row a frame");
    const InnerLoops& loops = loops_at(instruction_set);
    const auto values = static_cast<std::int64_t>(out.shape(1));
    nb::gil_scoped_release release;
    pool.for_each(static_cast<std::int64_t>(key.shape(0)), [&](std::int64_t f) {
      const std::int64_t* k = key.data() + f * 5;
      loops.noise({static_cast<std::uint64_t>(k[0]), static_cast<std::uint32_t>(k[1]), static_cast<std::int32_t>(k[2]), k[3]},
                  0, values, out.data() + f * values);
    });
  }, "key"_a, "out"_a, "pool"_a, "instruction_set"_a = nb::none());
  m.def("to_uint8", [](Array<const float> frames, Array<std::uint8_t> out, ThreadPool& pool, std::optional<int> instruction_set) {
    require(frames.size() == out.size(), "frames and out differ in size");
    nb::gil_scoped_release release;
    to_uint8(frames.data(), static_cast<std::int64_t>(frames.size()), out.data(), pool, loops_at(instruction_set));
  }, "frames"_a, "out"_a, "pool"_a, "instruction_set"_a = nb::none());
  m.def("to_yuv420p", [](Array<const float, nb::shape<-1, -1, -1, 3>> frames, Array<std::uint8_t> out, bool bt709, ThreadPool& pool) {
    require(out.size() * 2 == frames.size(), "out must hold height * width * 3 / 2 bytes a frame");
    nb::gil_scoped_release release;
    to_yuv420p(frames.data(), static_cast<std::int64_t>(frames.shape(0)), static_cast<std::int64_t>(frames.shape(1)),
               static_cast<std::int64_t>(frames.shape(2)), bt709 ? ColourMatrix::bt709 : ColourMatrix::bt601, out.data(), pool);
  }, "frames"_a, "out"_a, "bt709"_a, "pool"_a);
}
