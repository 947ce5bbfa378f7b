// Large tensors in memory that is kept for later ones, in large pages.
//
// New memory has to be found by the system page by page, and under a hypervisor by the host too: of a
// long prompt that may take a fifth of the time. While a thread keeps memory, its large tensors are
// taken from what others of them have let go, and what is let go is left to the system should it
// need some (MADV_FREE). What is in use and what lies idle are together at most 1.5 times what once was in
// use: pieces are of one size each, and not all fit when their turn comes.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "operators.h"

namespace {

constexpr size_t kLarge = 1 << 21;  // bytes of a large page on x86-64, and on Arm with pages of 4 KB
constexpr size_t kLeast = 1 << 22;  // of a tensor that lies in them: less stays near the processor in the heap

thread_local int64_t keeping = 0;  // scopes of this thread that keep memory

struct Piece {
  void* at;
  size_t size;
  bool left;  // to the system
};

class Kept final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* at = keeping > 0 && bytes >= kLeast ? take(bytes) : nullptr;
    if (at != nullptr) return {at, at, &let_go, c10::Device(c10::DeviceType::CPU)};
    c10::DataPtr made = plain_->allocate(bytes);
    made.compare_exchange_deleter(plain_->raw_deleter(), raw_deleter());
    return made;
  }
  c10::DeleterFnPtr raw_deleter() const override { return plain_->raw_deleter() ? &let_go : nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Those who may take memory: what lies idle is given back with the last.
  void hold(int64_t more) {
    const std::lock_guard here(guard_);
    holders_ += more;
    if (holders_ == 0) most_ = 0, shrink();
  }

  void lock() { guard_.lock(); }
  void unlock() { guard_.unlock(); }

  void leave_to_system() {
    const std::lock_guard here(guard_);
    for (Piece& piece : idle_) leave(piece);
  }

 private:
  void* take(size_t bytes) {
    const std::lock_guard here(guard_);
    auto best = idle_.end();
    for (auto i = idle_.begin(); i != idle_.end(); i++) {
      const bool fits = i->size >= bytes && i->size <= 2 * bytes + kLarge;
      if (fits && (best == idle_.end() || i->size <= best->size)) best = i;  // of equals the latest
    }
    Piece piece{};
    if (best != idle_.end()) {
      piece = *best;
      idle_.erase(best);
      idle_bytes_ -= piece.size;
    } else {
      piece = mapped((bytes + kLarge - 1) / kLarge * kLarge);
    }
    if (piece.at == nullptr) return nullptr;
    used_[piece.at] = piece.size;
    used_bytes_ += piece.size;
    most_ = std::max(most_, used_bytes_);
    shrink();
    return piece.at;
  }

  static void let_go(void* at);

  void put(void* at) {
    if (reinterpret_cast<uintptr_t>(at) % kLarge != 0) return plain_->raw_deleter()(at);
    std::unique_lock here(guard_);
    const auto found = used_.find(at);
    if (found == used_.end()) {
      here.unlock();
      return plain_->raw_deleter()(at);
    }
    Piece piece{at, found->second, false};
    used_bytes_ -= piece.size;
    used_.erase(found);
    if (keeping == 0) leave(piece);  // else once for all, where the scope ends
    idle_bytes_ += piece.size;
    idle_.push_back(piece);
    shrink();
  }

  // Give the oldest of what is idle back, where all is more than 1.5 times what was in use at once.
  void shrink() {
    while (!idle_.empty() && (holders_ == 0 || idle_bytes_ + used_bytes_ > most_ + most_ / 2)) {
      munmap(idle_.front().at, idle_.front().size);
      idle_bytes_ -= idle_.front().size;
      idle_.erase(idle_.begin());
    }
  }

  static void leave(Piece& piece) {
    if (!piece.left) madvise(piece.at, piece.size, MADV_FREE);
    piece.left = true;
  }

  // New memory that begins with a large page; none where the system gives none.
  static Piece mapped(size_t size) {
    void* all = mmap(nullptr, size + kLarge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return {};
    const size_t before = -reinterpret_cast<uintptr_t>(all) % kLarge;
    char* at = static_cast<char*>(all) + before;
    if (before > 0) munmap(all, before);
    munmap(at + size, kLarge - before);
    madvise(at, size, MADV_HUGEPAGE);
    return {at, size, false};
  }

  c10::Allocator* const plain_ = c10::GetCPUAllocator();
  std::mutex guard_;
  std::map<void*, size_t> used_;
  std::vector<Piece> idle_;  // the oldest first
  size_t used_bytes_ = 0, idle_bytes_ = 0, most_ = 0;
  int64_t holders_ = 0;
};

// What torch takes its memory from, once it was asked for; tensors may outlive everything else. A
// process that is forked finds it as between two calls.
Kept& kept() {
  static Kept* const made = [] {
    auto* first = new Kept;
    pthread_atfork([] { kept().lock(); }, [] { kept().unlock(); }, [] { kept().unlock(); });
    c10::SetCPUAllocator(first, /*priority=*/0);
    return first;
  }();
  return *made;
}

void Kept::let_go(void* at) { kept().put(at); }

}  // namespace

void attnopt::hold_memory(bool on) { kept().hold(on ? 1 : -1); }

void attnopt::keep_memory(bool on) {
  keeping += on ? 1 : -1;
  if (keeping == 0) kept().leave_to_system();
}
