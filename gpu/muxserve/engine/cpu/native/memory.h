#pragma once

#include <cstdint>
#include <memory>
#include <new>

// Memory of a pass. Grows with the largest pass, and is kept.
class Memory {
  public:
    template <class T>
    T* take(int64_t count) {
        used_ = (used_ + 63) / 64 * 64;
        int64_t at = used_;
        used_ += count * sizeof(T);
        return reinterpret_cast<T*>(base_ + at);
    }
    void reset() { used_ = 0; }
    // Makes room for what was taken since `reset`; true if it had to grow, and all must be taken again.
    bool grow() {
        if (used_ + 64 <= size_) return false;
        size_ = used_ + used_ / 4 + 4096;
        bytes_.reset(new (std::align_val_t(4096)) char[size_]());
        base_ = bytes_.get();
        return true;
    }

  private:
    struct Free {
        void operator()(char* p) const { ::operator delete[](p, std::align_val_t(4096)); }
    };
    std::unique_ptr<char, Free> bytes_;
    char* base_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};
