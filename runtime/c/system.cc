#include "system.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <sstream>

#include "errors.h"

#ifdef _WIN32
#include <malloc.h>
#include <windows.h>

#include <cpuid.h>

#include <cwctype>
#else
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif
#endif

namespace wasat {

void set_default(const char *name, const std::string &value) {
  if (!std::getenv(name)) set_variable(name, value);
}

#ifdef _WIN32
const char SYSTEM[] = "win32";

namespace {

std::wstring wide(const std::string &text) {
  std::wstring found(MultiByteToWideChar(CP_UTF8, 0, text.data(), int(text.size()), nullptr, 0), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, text.data(), int(text.size()), found.data(), int(found.size()));
  return found;
}

std::string narrow(const wchar_t *text) {
  std::string found(WideCharToMultiByte(CP_UTF8, 0, text, -1, nullptr, 0, nullptr, nullptr), '\0');
  WideCharToMultiByte(CP_UTF8, 0, text, -1, found.data(), int(found.size()), nullptr, nullptr);
  found.pop_back();  // its end
  return found;
}

std::string last_error() {
  wchar_t text[512];
  DWORD code = GetLastError();
  DWORD size = FormatMessageW(FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS, nullptr, code, 0, text, 512, nullptr);
  while (size && std::iswspace(text[size - 1])) size--;
  text[size] = 0;
  return size ? narrow(text) : "error " + std::to_string(code);
}

}  // namespace

std::string processor() {
  SYSTEM_INFO info;
  GetNativeSystemInfo(&info);
  return info.wProcessorArchitecture == PROCESSOR_ARCHITECTURE_AMD64 ? "x86_64" : "aarch64";
}

int cpu_count() {
  DWORD_PTR own, all;
  if (!GetProcessAffinityMask(GetCurrentProcess(), &own, &all)) return 1;
  return std::max(__builtin_popcountll(own), 1);
}

std::string library_file(const std::string &name) { return name + ".dll"; }

std::optional<std::string> load_library(const std::string &path) {
  if (LoadLibraryExW(wide(path).c_str(), nullptr, LOAD_WITH_ALTERED_SEARCH_PATH)) return std::nullopt;
  return last_error();
}

std::string plain_path(const std::string &path) {
  auto plain = [](const std::string &text) { return std::all_of(text.begin(), text.end(), [](char c) { return c > 0; }); };
  if (plain(path)) return path;
  wchar_t brief[MAX_PATH + 1];
  DWORD size = GetShortPathNameW(wide(path).c_str(), brief, MAX_PATH + 1);
  if (size && size <= MAX_PATH && plain(narrow(brief))) return narrow(brief);
  throw Error(WASAT_SYSTEM, path + " cannot be opened by TVM, whose paths are ASCII: move the artifact to another folder");
}

void set_variable(const char *name, const std::string &value) {
  _putenv_s(name, value.c_str());                // for what shares this C library
  SetEnvironmentVariableA(name, value.c_str());  // and for what has another
}

void *allocate(size_t bytes) {
  if (void *memory = _aligned_malloc(bytes, ALIGNMENT)) return memory;
  throw std::bad_alloc();
}

void release(void *memory) { _aligned_free(memory); }

Mapped::Mapped(const std::string &path) {
  HANDLE file = CreateFileW(wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, nullptr, OPEN_EXISTING, 0, nullptr);
  LARGE_INTEGER size{};
  if (file == INVALID_HANDLE_VALUE || !GetFileSizeEx(file, &size)) {
    std::string why = last_error();
    if (file != INVALID_HANDLE_VALUE) CloseHandle(file);
    throw Error(WASAT_SYSTEM, path + " cannot be read: " + why);
  }
  size_ = size_t(size.QuadPart);
  if (size_) {
    HANDLE pages = CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
    memory_ = pages ? MapViewOfFile(pages, FILE_MAP_READ, 0, 0, 0) : nullptr;
    std::string why = memory_ ? "" : last_error();
    if (pages) CloseHandle(pages);
    if (!memory_) {
      CloseHandle(file);
      throw Error(WASAT_SYSTEM, path + " cannot be mapped: " + why);
    }
  }
  CloseHandle(file);
}

Mapped::~Mapped() {
  if (memory_) UnmapViewOfFile(memory_);
}

#else
#ifdef __APPLE__
const char SYSTEM[] = "darwin";
std::string library_file(const std::string &name) { return "lib" + name + ".dylib"; }
#else
const char SYSTEM[] = "linux";
std::string library_file(const std::string &name) { return "lib" + name + ".so"; }
#endif

std::string processor() {
  utsname here{};
  uname(&here);
  return std::strcmp(here.machine, "arm64") ? here.machine : "aarch64";
}

int cpu_count() {
#ifdef __linux__
  cpu_set_t set;
  if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
#endif
  return int(std::max<long>(sysconf(_SC_NPROCESSORS_ONLN), 1));
}

std::optional<std::string> load_library(const std::string &path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) return std::nullopt;
  return dlerror();
}

std::string plain_path(const std::string &path) { return path; }

void set_variable(const char *name, const std::string &value) { setenv(name, value.c_str(), 1); }

void *allocate(size_t bytes) {
  if (void *memory = std::aligned_alloc(ALIGNMENT, bytes)) return memory;
  throw std::bad_alloc();
}

void release(void *memory) { std::free(memory); }

Mapped::Mapped(const std::string &path) {
  int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info{};
  if (file < 0 || fstat(file, &info)) {
    std::string why = std::strerror(errno);
    if (file >= 0) close(file);
    throw Error(WASAT_SYSTEM, path + " cannot be read: " + why);
  }
  size_ = info.st_size;
  memory_ = size_ ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : nullptr;
  close(file);
  if (memory_ == MAP_FAILED) throw Error(WASAT_SYSTEM, path + " cannot be mapped: " + std::strerror(errno));
}

Mapped::~Mapped() {
  if (memory_) munmap(memory_, size_);
}
#endif

#if defined(_WIN32) && defined(__x86_64__)
std::set<std::string> cpu_features() {  // by the processor's own word, less what the system does not keep of its registers
  static const struct {
    const char *name;
    unsigned leaf, part, reg, bit;  // of eax, ebx, ecx, edx
  } known[] = {
      {"pni", 1, 0, 2, 0},          {"ssse3", 1, 0, 2, 9},         {"fma", 1, 0, 2, 12},           {"sse4_1", 1, 0, 2, 19},
      {"sse4_2", 1, 0, 2, 20},      {"movbe", 1, 0, 2, 22},        {"popcnt", 1, 0, 2, 23},        {"avx", 1, 0, 2, 28},
      {"f16c", 1, 0, 2, 29},        {"bmi1", 7, 0, 1, 3},          {"avx2", 7, 0, 1, 5},           {"bmi2", 7, 0, 1, 8},
      {"avx512f", 7, 0, 1, 16},     {"avx512dq", 7, 0, 1, 17},     {"avx512ifma", 7, 0, 1, 21},    {"avx512cd", 7, 0, 1, 28},
      {"avx512bw", 7, 0, 1, 30},    {"avx512vl", 7, 0, 1, 31},     {"avx512vbmi", 7, 0, 2, 1},     {"avx512_vbmi2", 7, 0, 2, 6},
      {"gfni", 7, 0, 2, 8},         {"avx512_vnni", 7, 0, 2, 11},  {"avx512_bitalg", 7, 0, 2, 12}, {"avx512_vpopcntdq", 7, 0, 2, 14},
      {"avx512_fp16", 7, 0, 3, 23}, {"avx_vnni", 7, 1, 0, 4},      {"avx512_bf16", 7, 1, 0, 5},    {"abm", 0x80000001, 0, 2, 5},
      {"sse4a", 0x80000001, 0, 2, 6}, {"xop", 0x80000001, 0, 2, 11}, {"fma4", 0x80000001, 0, 2, 16}, {"tbm", 0x80000001, 0, 2, 21}};
  unsigned r[4] = {}, low = 0, high = 0;
  __get_cpuid_count(1, 0, &r[0], &r[1], &r[2], &r[3]);
  if (r[2] >> 27 & 1) __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  bool wide = (low & 0x06) == 0x06, widest = (low & 0xe6) == 0xe6;
  std::set<std::string> found;
  for (auto &f : known) {
    std::string name = f.name;
    bool of_512 = name.rfind("avx512", 0) == 0, of_256 = name.rfind("avx", 0) == 0 || name == "fma" || name == "f16c";
    if ((of_512 && !widest) || (of_256 && !wide)) continue;
    if (__get_cpuid_count(f.leaf, f.part, &r[0], &r[1], &r[2], &r[3]) && r[f.reg] >> f.bit & 1) found.insert(name);
  }
  return found;
}
#else
std::set<std::string> cpu_features() {
#ifdef __linux__  // an emulator may show the file of the machine that it runs on, which lists none of ours
#ifdef __aarch64__
  static const char list[] = "Features";
#else
  static const char list[] = "flags";
#endif
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    if (colon == 0 || key != list) continue;
    std::istringstream words(line.substr(colon + 1));
    return {std::istream_iterator<std::string>(words), {}};
  }
#endif
  return {};
}
#endif

}  // namespace wasat
