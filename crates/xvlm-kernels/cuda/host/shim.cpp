// Runs the kernels on the host; see shim.hpp. One file with all of them, so that the linker keeps each.

// Its check of longjmp takes the change of stacks for an error.
#undef _FORTIFY_SOURCE
#define _FORTIFY_SOURCE 0

// What several kernels share, outside of their namespaces.
#include "attention.cuh"
#include "rows.cuh"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

namespace shim {

dim3 block_index, block_size, grid_size;

namespace {

enum class State { Ready, AtBlock, AtWarp, Done };

struct Fibre {
    static constexpr std::size_t STACK = 256 * 1024;
    // Where it starts, and where it goes on: contexts alone would do, but each change of them is a system call.
    ucontext_t context;
    jmp_buf paused;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[STACK]};
    dim3 index;
    State state = State::Done;
};

std::vector<Fibre> fibres;
std::vector<std::uint64_t> exchanged;
std::vector<std::max_align_t> shared;
jmp_buf scheduler;
std::size_t running = 0;
Entry entry;
const void *const *entry_arguments;

void start() {
    entry.call(entry.kernel, entry_arguments);
    fibres[running].state = State::Done;
    _longjmp(scheduler, 1);
}

void wait(State at) {
    Fibre &fibre = fibres[running];
    fibre.state = at;
    if (_setjmp(fibre.paused) == 0) _longjmp(scheduler, 1);
}

// Runs a fibre until it waits or ends.
void go_on(Fibre &fibre) {
    if (_setjmp(scheduler) != 0) return;
    if (fibre.started) _longjmp(fibre.paused, 1);
    fibre.started = true;
    setcontext(&fibre.context);
}

// Lets those go on who have all arrived: the threads from `begin` to `end` that still run.
bool release(std::size_t begin, std::size_t end, State at) {
    bool any = false;
    for (std::size_t i = begin; i < end; ++i) {
        if (fibres[i].state == State::Done) continue;
        if (fibres[i].state != at) return false;
        any = true;
    }
    for (std::size_t i = begin; i < end; ++i)
        if (fibres[i].state == at) fibres[i].state = State::Ready;
    return any;
}

void run_block(std::size_t threads, const char *name) {
    for (std::size_t i = 0; i < threads; ++i) {
        Fibre &fibre = fibres[i];
        getcontext(&fibre.context);
        fibre.context.uc_stack = {.ss_sp = fibre.stack.get(), .ss_flags = 0, .ss_size = Fibre::STACK};
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, start, 0);
        fibre.index = {unsigned(i), 0, 0};
        fibre.started = false;
        fibre.state = State::Ready;
    }
    for (;;) {
        bool all_done = true, any_ran = false;
        for (running = 0; running < threads; ++running) {
            if (fibres[running].state == State::Ready) {
                go_on(fibres[running]);
                any_ran = true;
            }
            all_done &= fibres[running].state == State::Done;
        }
        if (all_done) return;
        bool released = release(0, threads, State::AtBlock);
        for (std::size_t warp = 0; warp < threads; warp += 32)
            released |= release(warp, std::min(warp + 32, threads), State::AtWarp);
        if (!any_ran && !released) {
            std::fprintf(stderr, "%s: some threads wait at a barrier that others never reach\n", name);
            std::abort();
        }
    }
}

} // namespace

const dim3 &thread_index() { return fibres[running].index; }
void *dynamic_shared() { return shared.data(); }
void wait_for_block() { wait(State::AtBlock); }
void wait_for_warp() { wait(State::AtWarp); }
unsigned lane() { return running % 32; }

const std::uint64_t *exchange(std::uint64_t bits) {
    exchanged[running] = bits;
    const std::size_t first = running / 32 * 32;
    wait_for_warp();
    return &exchanged[first];
}

std::unordered_map<std::string, Entry> &kernels() {
    static std::unordered_map<std::string, Entry> entries;
    return entries;
}

} // namespace shim

extern "C" int xvlm_emulate(const char *name, const unsigned *blocks, unsigned threads, std::size_t shared_bytes,
                            const void *const *arguments, std::size_t count) {
    using namespace shim;
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    const auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    if (found->second.count != count) return 2;
    entry = found->second;
    entry_arguments = arguments;
    grid_size = {blocks[0], blocks[1], blocks[2]};
    block_size = {threads, 1, 1};
    if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
    exchanged.assign((threads + 31) / 32 * 32, 0);
    // Behind the memory that the launch asked for is some that no kernel may write.
    constexpr std::size_t GUARD = 64;
    shared.resize(shared_bytes / sizeof(std::max_align_t) + GUARD);
    for (unsigned z = 0; z < blocks[2]; ++z)
        for (unsigned y = 0; y < blocks[1]; ++y)
            for (unsigned x = 0; x < blocks[0]; ++x) {
                block_index = {x, y, z};
                // A pattern that is NaN in every float type: shared memory starts undefined.
                std::memset(shared.data(), 0xff, shared.size() * sizeof(std::max_align_t));
                run_block(threads, name);
                const auto *bytes = reinterpret_cast<const unsigned char *>(shared.data());
                if (!std::all_of(bytes + shared_bytes, bytes + shared.size() * sizeof(std::max_align_t),
                                 [](unsigned char byte) { return byte == 0xff; })) {
                    std::fprintf(stderr, "%s: writes behind its shared memory\n", name);
                    std::abort();
                }
            }
    return 0;
}

#include "kernels.inc"
