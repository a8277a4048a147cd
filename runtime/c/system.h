// What differs from system to system: Linux, macOS, Windows.
#pragma once
#include <cstddef>
#include <optional>
#include <set>
#include <string>
#include <string_view>

namespace wasat {

// The system and the processor, as Python's sys.platform and Linux call them.
extern const char SYSTEM[];
std::string processor();

// Instruction sets, as /proc/cpuinfo calls them; none where nobody says.
std::set<std::string> cpu_features();

// CPUs that this process may use.
int cpu_count();

// The file of a library, without what comes before and after its name there.
std::string library_file(const std::string &name);

// Loads a library whose functions others see; why not, where that is impossible.
std::optional<std::string> load_library(const std::string &path);

// A path as TVM opens it, which takes ASCII alone under Windows. Throws Error where there is none.
std::string plain_path(const std::string &path);

// Sets a variable of the environment; or leaves it as it is set.
void set_default(const char *name, const std::string &value);
void set_variable(const char *name, const std::string &value);

// Memory whose address is a multiple of 64, what code generation assumes of every tensor's; so must be its size. Throws
// std::bad_alloc.
constexpr size_t ALIGNMENT = 64;
void *allocate(size_t bytes);
void release(void *memory);

// A file, mapped. Throws Error.
class Mapped {
 public:
  explicit Mapped(const std::string &path);
  ~Mapped();
  Mapped(const Mapped &) = delete;
  std::string_view data() const { return {static_cast<const char *>(memory_), size_}; }

 private:
  void *memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace wasat
