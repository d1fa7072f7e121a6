// Runs the kernels on the host; see shim.hpp. One file with all of them, so that the linker keeps each.
#include "rows.cuh"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include <ucontext.h>

namespace shim {

dim3 block_index, block_size, grid_size;

namespace {

enum class State { Ready, AtBlock, AtWarp, Done };

struct Fibre {
    static constexpr std::size_t STACK = 256 * 1024;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    dim3 index;
    State state = State::Done;
};

std::vector<Fibre> fibres;
std::vector<std::uint64_t> exchanged;
std::vector<std::max_align_t> shared;
ucontext_t scheduler;
std::size_t running = 0;
Entry entry;
const void *const *entry_arguments;

void start() {
    entry.call(entry.kernel, entry_arguments);
    fibres[running].state = State::Done;
    swapcontext(&fibres[running].context, &scheduler);
}

void wait(State at) {
    Fibre &fibre = fibres[running];
    fibre.state = at;
    swapcontext(&fibre.context, &scheduler);
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
        fibre.state = State::Ready;
    }
    for (;;) {
        bool all_done = true, any_ran = false;
        for (running = 0; running < threads; ++running) {
            if (fibres[running].state == State::Ready) {
                swapcontext(&scheduler, &fibres[running].context);
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
    shared.resize(shared_bytes / sizeof(std::max_align_t) + 1);
    for (unsigned z = 0; z < blocks[2]; ++z)
        for (unsigned y = 0; y < blocks[1]; ++y)
            for (unsigned x = 0; x < blocks[0]; ++x) {
                block_index = {x, y, z};
                // A pattern that is NaN in every float type: shared memory starts undefined.
                std::memset(shared.data(), 0xff, shared.size() * sizeof(std::max_align_t));
                run_block(threads, name);
            }
    return 0;
}

#include "kernels.inc"
