// The scheduler and the memory of the emulated card.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedLimit = 48 * 1024;
constexpr unsigned kClusterLimit = 8;

[[noreturn]] void give_up(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  int all = 1, result = 1;
};

struct Warp {
  Barrier barrier;
  float exchanged[2][32];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<float4[]> shared;
  size_t shared_floats = 0;
  unsigned left = 0;
};

struct Fiber {
  ucontext_t context;
  dim3 thread, block_index;
  Block* block = nullptr;
  unsigned shuffles = 0;
  const Barrier* waits = nullptr;
  unsigned generation = 0;
  bool done = false;
};

std::mutex running;
ucontext_t scheduler;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::vector<Block> blocks;
Barrier cluster_barrier;
bool released = false;  // some barrier, since the scheduler last looked

int arrive(Barrier& barrier, int predicate) {
  barrier.all &= predicate != 0;
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.result = barrier.all;
    barrier.all = 1;
    ++barrier.generation;
    released = true;
  } else {
    current->waits = &barrier;
    current->generation = generation;
    swapcontext(&current->context, &scheduler);
  }
  return barrier.result;
}

void enter() {
  (*body)();
  current->done = true;
}

// Warps in random order; block by block, or all blocks' warps mixed.
void set_priorities(std::vector<size_t>& order, unsigned threads, bool by_block, std::mt19937& random) {
  std::vector<std::pair<unsigned, unsigned>> keys(order.size());
  std::vector<unsigned> of_block(order.size() / threads);
  for (unsigned& key : of_block) key = by_block ? static_cast<unsigned>(random()) : 0;
  for (size_t i = 0; i < keys.size(); ++i)
    keys[i] = {of_block[i / threads], i % 32 == 0 ? static_cast<unsigned>(random()) : keys[i - 1].second};
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&keys](size_t a, size_t b) { return keys[a] < keys[b]; });
}

__attribute__((noinline)) void prepare(ucontext_t& context, unsigned char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = &scheduler;
  makecontext(&context, enter, 0);
}

struct Settings {
  int device_count = 1, compute_major = 9, active_clusters = 1;
  int64_t calls = 0, failing_call = -1, launches = 0;
  unsigned seed = 0;
} settings;

std::map<void*, std::pair<void*, size_t>> allocations;  // what cudaMalloc gave: its mapping
size_t live_bytes = 0;

}  // namespace

void sync_block() { arrive(current->block->barrier, 1); }
int sync_block_and(int predicate) { return arrive(current->block->barrier, predicate); }

float shuffle_xor(float value, int offset) {
  const unsigned lane = current->thread.x % 32;
  Warp& warp = current->block->warps[current->thread.x / 32];
  float* const slot = warp.exchanged[current->shuffles++ % 2];
  slot[lane] = value;
  arrive(warp.barrier, 1);
  return slot[lane ^ static_cast<unsigned>(offset)];
}

void run(dim3 grid, dim3 threads, size_t shared_bytes, unsigned cluster, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(running);
  ++settings.launches;
  if (threads.x == 0 || threads.x > 1024 || threads.x % 32 != 0 || threads.y != 1 || threads.z != 1)
    give_up("blocks must be whole warps in x");
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1 || grid.x % cluster != 0) give_up("a wrong grid");
  if (shared_bytes > kSharedLimit) give_up("too much shared memory");
  if (cluster > kClusterLimit || (cluster > 1 && settings.compute_major < 9)) give_up("a cluster the card lacks");
  static std::vector<unsigned char> stacks;
  const size_t count = static_cast<size_t>(cluster) * threads.x;
  if (stacks.size() < count * kStackBytes) stacks.resize(count * kStackBytes);
  std::mt19937 random(settings.seed);
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::vector<Fiber> fibers(count);
  body = &kernel;
  blockDim = threads;
  gridDim = grid;

  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned first = 0; first < grid.x; first += cluster) {
      blocks.clear();
      blocks.resize(cluster);
      cluster_barrier = Barrier{};
      cluster_barrier.expected = static_cast<unsigned>(count);
      for (Block& block : blocks) {
        block.barrier.expected = block.left = threads.x;
        block.warps.resize(threads.x / 32);
        for (Warp& warp : block.warps) warp.barrier.expected = 32;
        block.shared_floats = shared_bytes / sizeof(float);
        block.shared.reset(new float4[shared_bytes / sizeof(float4) + 1]);
        std::memset(block.shared.get(), 0xff, (shared_bytes / sizeof(float4) + 1) * sizeof(float4));
      }
      for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = dim3(static_cast<unsigned>(i % threads.x), 0, 0);
        fiber.block_index = dim3(first + static_cast<unsigned>(i / threads.x), y, 0);
        fiber.block = &blocks[i / threads.x];
        fiber.shuffles = 0;
        fiber.waits = nullptr;
        fiber.done = false;
        prepare(fiber.context, stacks.data() + i * kStackBytes);
      }
      // Seed 0: every thread goes on by one barrier, then the next round. Any other: a random order of blocks and warps
      // is a strict priority, so that one runs as far ahead of another as the barriers allow.
      if (settings.seed != 0) set_priorities(order, threads.x, settings.seed % 2 == 0, random);
      for (size_t left = count; left > 0;) {
        bool moved = false;
        for (size_t position = 0; position < count; ++position) {
          Fiber& fiber = fibers[order[position]];
          if (fiber.done || (fiber.waits != nullptr && fiber.waits->generation == fiber.generation)) continue;
          fiber.waits = nullptr;
          current = &fiber;
          threadIdx = fiber.thread;
          blockIdx = fiber.block_index;
          moved = true;
          released = false;
          swapcontext(&scheduler, &fiber.context);
          if (fiber.done) {
            --left;
            // A block that has left takes its shared memory along.
            if (--fiber.block->left == 0) std::memset(fiber.block->shared.get(), 0xff, shared_bytes);
          }
          if (released && settings.seed != 0) break;
        }
        if (!moved) give_up("threads wait at a barrier that others never reach");
      }
    }
}

// 0, or 1 where this call was chosen to fail.
int next_call() { return settings.calls++ == settings.failing_call; }

}  // namespace emulation

using namespace emulation;

namespace trivium {

float* shared_floats() { return reinterpret_cast<float*>(current->block->shared.get()); }

void sync_cluster() { arrive(cluster_barrier, 1); }

const float* peer_shared(float* own, int rank) {
  const ptrdiff_t offset = own - shared_floats();
  const Block& peer = blocks.at(static_cast<size_t>(rank));
  if (offset < 0 || static_cast<size_t>(offset) >= peer.shared_floats) give_up("not an address of shared memory");
  return reinterpret_cast<const float*>(peer.shared.get()) + offset;
}

}  // namespace trivium

cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings.device_count;
  return settings.device_count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  if (next_call() != 0) return cudaErrorUnknown;
  return settings.device_count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = settings.compute_major;
  return next_call() != 0 ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (next_call() != 0) return cudaErrorMemoryAllocation;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), used = (bytes + 15) / 16 * 16;
  const size_t mapped = (used + page - 1) / page * page + page;
  auto* const base = static_cast<unsigned char*>(
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) return cudaErrorMemoryAllocation;
  mprotect(base + mapped - page, page, PROT_NONE);
  *memory = base + mapped - page - used;
  std::memset(*memory, 0xff, used);
  const std::lock_guard<std::mutex> lock(running);
  allocations[*memory] = {base, mapped};
  live_bytes += mapped;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(running);
  const auto found = allocations.find(memory);
  if (found == allocations.end()) give_up("cudaFree of what cudaMalloc never gave");
  munmap(found->second.first, found->second.second);
  live_bytes -= found->second.second;
  allocations.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (next_call() != 0) return cudaErrorUnknown;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return next_call() != 0 ? cudaErrorUnknown : cudaSuccess; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return next_call() != 0 ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = settings.active_clusters;
  return next_call() != 0 ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

extern "C" __attribute__((visibility("default"))) void emulation_configure(int device_count, int compute_major,
                                                                           int active_clusters, unsigned seed) {
  settings.device_count = device_count;
  settings.compute_major = compute_major;
  settings.active_clusters = active_clusters;
  settings.seed = seed;
}

// Let the nth call from now on fail (counted from 0; -1: none); returns how many calls were made since the last time.
extern "C" __attribute__((visibility("default"))) int64_t emulation_fail(int64_t nth) {
  const int64_t made = settings.calls;
  settings.calls = 0;
  settings.failing_call = nth;
  return made;
}

extern "C" __attribute__((visibility("default"))) int64_t emulation_launches() { return settings.launches; }
extern "C" __attribute__((visibility("default"))) int64_t emulation_live_bytes() {
  return static_cast<int64_t>(live_bytes);
}
extern "C" __attribute__((visibility("default"))) void* emulation_allocate(int64_t bytes) {
  void* memory = nullptr;
  return cudaMalloc(&memory, static_cast<size_t>(bytes)) == cudaSuccess ? memory : nullptr;
}
extern "C" __attribute__((visibility("default"))) void emulation_free(void* memory) { cudaFree(memory); }
