// A driver of GPUs without a GPU: libcuda's functions over host memory. What is sent to a stream is done when somebody waits for
// it, kernels in C++ for the processor, thread by thread; memory ends where a page does that nobody may touch.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

struct Index { unsigned x, y, z; };
extern "C" { Index threadIdx, blockIdx, blockDim, gridDim; }

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_IMAGE = 200, NO_CONTEXT = 201, NO_BINARY = 209,
       NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, LAUNCH_FAILURE = 719, CAPTURING = 900 };

static std::map<std::string, long> settings = {
    {"status", 0}, {"devices", 1}, {"major", 9}, {"minor", 0}, {"memory", 1L << 40}, {"backwards", 0}, {"threads", 1024},
    {"shared", 49152}, {"refused", 0}};
static std::map<std::string, long> counts;
static std::string complaint;
static int broken = OK;

extern "C" void soft_set(const char* key, long value) { settings[key] = value; }
extern "C" long soft_get(const char* key) { return counts[key]; }
extern "C" const char* soft_complaint() { return complaint.c_str(); }
extern "C" void soft_repair() { broken = OK; complaint.clear(); }

static int fails(int code, const std::string& why) {
  complaint = why;
  return broken = code;
}

// -- memory -----------------------------------------------------------------------------------------------------------------
struct Memory { char* map; size_t whole, nbytes; };
static std::map<uint64_t, Memory> memories;
static thread_local void* context;

static Memory* around(uint64_t at, size_t nbytes) {
  auto i = memories.upper_bound(at);
  if (i == memories.begin()) return nullptr;
  --i;
  return at + nbytes <= i->first + i->second.nbytes ? &i->second : nullptr;
}

// -- kernels, a workgroup at a time -------------------------------------------------------------------------------------------
typedef void (*Kernel)(void**);
enum State { RUNS, AT_BARRIER, AT_WARP, DONE };
struct Fiber { char* stack; void* sp; State state; Index index; };
static const size_t STACK = 256 << 10;
static std::vector<Fiber> fibers;
static void* main_sp;
static Fiber* current;
static Kernel entered;
static void** given;
static uint64_t slots[1024];

extern "C" void soft_switch(void** from, void* to);
asm(R"(
.globl soft_switch
.type soft_switch, @function
soft_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

static void leave(State state) {
  current->state = state;
  soft_switch(&current->sp, main_sp);
}
static void begin() {
  entered(given);
  leave(DONE);
}
extern "C" void soft_barrier() { leave(AT_BARRIER); }
// What `lane` of the warp gives, where all of its threads come by; one that has ended, or that there is none of, gives `mine`.
extern "C" uint64_t soft_exchange(uint64_t mine, int lane) {
  long self = current - fibers.data(), first = self / 32 * 32;
  slots[self] = mine;
  leave(AT_WARP);
  bool there = lane >= 0 && lane < 32 && first + lane < (long)fibers.size() && fibers[first + lane].state != DONE;
  uint64_t found = there ? slots[first + lane] : mine;
  leave(AT_WARP);
  return found;
}
// What all lanes of the warp give, where they come by; it stays until all have come to soft_warp_done.
extern "C" const uint64_t* soft_warp(uint64_t mine) {
  long self = current - fibers.data();
  slots[self] = mine;
  leave(AT_WARP);
  return slots + self / 32 * 32;
}
extern "C" void soft_warp_done() { leave(AT_WARP); }
extern "C" int soft_lane() { return (current - fibers.data()) % 32; }

static bool workgroup(size_t threads) {
  while (fibers.size() < threads) {
    void* m = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fibers.push_back({(char*)m, nullptr, DONE, {}});
  }
  fibers.resize(threads);
  for (size_t i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.index = {(unsigned)(i % blockDim.x), (unsigned)(i / blockDim.x % blockDim.y), (unsigned)(i / blockDim.x / blockDim.y)};
    void** top = (void**)(f.stack + STACK) - 1;  // as a call leaves it
    *--top = (void*)begin;
    top -= 6;
    f.sp = top;
    f.state = RUNS;
  }
  for (long turn = 0;; turn++) {
    bool back = settings["backwards"] && turn % 2 == 0;
    for (size_t i = 0; i < threads; i++) {
      current = &fibers[back ? threads - 1 - i : i];
      if (current->state != RUNS) continue;
      threadIdx = current->index;
      soft_switch(&main_sp, current->sp);
    }
    size_t done = 0, barrier = 0;
    bool on = false;
    for (auto& f : fibers) done += f.state == DONE, barrier += f.state == AT_BARRIER;
    if (done == threads) return true;
    if (barrier == threads) {
      for (auto& f : fibers) f.state = RUNS;
      continue;
    }
    for (size_t w = 0; w < threads; w += 32) {
      size_t end = w + 32 < threads ? w + 32 : threads, waits = 0, ended = 0;
      for (size_t i = w; i < end; i++) waits += fibers[i].state == AT_WARP, ended += fibers[i].state == DONE;
      if (!waits || waits + ended < end - w) continue;
      on = true;
      for (size_t i = w; i < end; i++)
        if (fibers[i].state == AT_WARP) fibers[i].state = RUNS;
    }
    if (!on) return false;
  }
}

static sigjmp_buf escape;
static void trap(int) { siglongjmp(escape, 1); }

struct Function {
  std::string name;
  Kernel run;
  int arrays, meets;
  std::vector<int> sizes;
};

static int launched(const Function& f, Index grid, Index block, std::vector<uint64_t> values) {
  counts["launches"]++;
  if (!f.run) return OK;
  std::vector<void*> pointers;
  for (auto& v : values) pointers.push_back(&v);
  for (int i = 0; i < f.arrays; i++)
    if (!around(values[i], 1)) return fails(ILLEGAL_ADDRESS, f.name + ": argument " + std::to_string(i) + " is no memory");
  gridDim = grid, blockDim = block, entered = f.run, given = pointers.data();
  stack_t own = {}, before;
  static char alternate[1 << 16];
  own.ss_sp = alternate, own.ss_size = sizeof alternate;
  struct sigaction action = {}, segv, bus;
  action.sa_handler = trap, action.sa_flags = SA_ONSTACK | SA_NODEFER;
  sigaltstack(&own, &before);
  sigaction(SIGSEGV, &action, &segv), sigaction(SIGBUS, &action, &bus);
  size_t threads = (size_t)block.x * block.y * block.z;
  int code = OK;
  if (sigsetjmp(escape, 1)) {
    code = fails(ILLEGAL_ADDRESS, f.name + " touched what is no memory of the device");
  } else {
    for (unsigned z = 0; z < grid.z && !code; z++)
      for (unsigned y = 0; y < grid.y && !code; y++)
        for (unsigned x = 0; x < grid.x && !code; x++) {
          blockIdx = {x, y, z};
          if (f.meets) {
            if (!workgroup(threads)) code = fails(LAUNCH_FAILURE, f.name + ": not all threads come by a barrier");
            continue;
          }
          for (size_t i = 0; i < threads; i++) {
            size_t t = settings["backwards"] ? threads - 1 - i : i;
            threadIdx = {(unsigned)(t % block.x), (unsigned)(t / block.x % block.y), (unsigned)(t / block.x / block.y)};
            f.run(pointers.data());
          }
        }
  }
  sigaction(SIGSEGV, &segv, nullptr), sigaction(SIGBUS, &bus, nullptr);
  sigaltstack(&before, nullptr);
  return code;
}

// -- streams and graphs ---------------------------------------------------------------------------------------------------------
typedef std::function<int()> Work;
struct Graph { std::vector<Work> work; };
static std::vector<Work> queue;
static Graph* drawn;

static int send(Work w) {
  if (broken) return broken;
  if (!context) return NO_CONTEXT;
  (drawn ? drawn->work : queue).push_back(w);
  return OK;
}

static int finish() {
  std::vector<Work> now;
  now.swap(queue);
  for (auto& w : now)
    if (!broken) w();
  return broken;
}

extern "C" {
int cuInit(unsigned) { return (int)settings["status"]; }
int cuDriverGetVersion(int* v) { *v = 13000; return OK; }
int cuDeviceGetCount(int* n) { *n = (int)settings["devices"]; return OK; }
int cuDeviceGet(int* d, int i) { *d = i; return i < settings["devices"] ? OK : NO_DEVICE; }
int cuDeviceGetName(char* text, int n, int) { snprintf(text, n, "Soft GPU"); return OK; }
int cuDeviceGetAttribute(int* v, int a, int) {
  const char* name = a == 1 ? "threads" : a == 8 ? "shared" : a == 75 ? "major" : a == 76 ? "minor" : nullptr;
  if (!name) return INVALID;
  *v = (int)settings[name];
  return OK;
}
int cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)&settings; return OK; }
int cuCtxSetCurrent(void* c) { context = c; return broken; }
int cuStreamCreate(void** s, unsigned) { *s = (void*)&queue; return OK; }
int cuStreamSynchronize(void*) { counts["waits"]++; return drawn ? CAPTURING : finish(); }
int cuGetErrorName(int code, const char** text) {
  *text = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
  return OK;
}
int cuGetErrorString(int code, const char** text) {
  static std::string said;
  said = complaint.empty() ? "error " + std::to_string(code) : complaint;
  *text = said.c_str();
  return OK;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
  *total = settings["memory"], *free = *total - counts["bytes"];
  return OK;
}
int cuMemAlloc_v2(uint64_t* at, size_t nbytes) {
  if (!context) return NO_CONTEXT;
  if (broken) return broken;
  if (nbytes > (size_t)(settings["memory"] - counts["bytes"])) return OUT_OF_MEMORY;
  size_t page = 4096, room = (nbytes + 15) / 16 * 16, whole = (room + page - 1) / page * page + page;
  char* map = (char*)mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return OUT_OF_MEMORY;
  memset(map, 0xcb, whole - page);
  mprotect(map + whole - page, page, PROT_NONE);
  *at = (uint64_t)(map + whole - page - room);
  memories[*at] = {map, whole, nbytes};
  counts["memories"]++, counts["bytes"] += nbytes, counts["allocations"]++;
  return OK;
}
int cuMemFree_v2(uint64_t at) {
  if (!context) return NO_CONTEXT;
  finish();
  auto i = memories.find(at);
  if (i == memories.end()) return INVALID;
  counts["memories"]--, counts["bytes"] -= i->second.nbytes;
  munmap(i->second.map, i->second.whole);
  memories.erase(i);
  return OK;
}
int cuMemHostAlloc(void** at, size_t nbytes, unsigned) { *at = malloc(nbytes); counts["pinned"]++; return OK; }
int cuMemFreeHost(void* at) { finish(); free(at); counts["pinned"]--; return OK; }
static int moved(uint64_t to, uint64_t from, size_t n, bool to_device, bool from_device) {
  if ((to_device && !around(to, n)) || (from_device && !around(from, n)))
    return fails(ILLEGAL_ADDRESS, "a copy of " + std::to_string(n) + " bytes leaves its memory");
  memmove((void*)to, (void*)from, n);
  return OK;
}
int cuMemsetD32Async(uint64_t at, unsigned v, size_t n, void*) {
  return send([=] {
    if (!around(at, n * 4)) return fails(ILLEGAL_ADDRESS, "a fill leaves its memory");
    for (size_t i = 0; i < n; i++) ((unsigned*)at)[i] = v;
    return (int)OK;
  });
}
int cuMemcpyHtoDAsync_v2(uint64_t to, void* from, size_t n, void*) {
  return send([=] { return moved(to, (uint64_t)from, n, true, false); });
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, void*) {
  return send([=] { return moved((uint64_t)to, from, n, false, true); });
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void*) {
  return send([=] { return moved(to, from, n, true, true); });
}

// Machine code is checked for the GPU that this stands for; what runs is registered under the same bytes.
struct Module { void* library; std::set<std::string> names; std::map<std::string, Function> functions; };
static std::map<std::string, std::string> registered;
static size_t size_of(const char* image) {
  uint16_t head;
  uint64_t rest;
  memcpy(&head, image + 6, 2), memcpy(&rest, image + 8, 8);
  return head + rest;
}
void soft_register(const char* image, const char* library) { registered[std::string(image, size_of(image))] = library; }
int cuModuleLoadData(void** out, const char* image) {
  uint32_t magic;
  memcpy(&magic, image, 4);
  if (magic != 0xBA55ED50) return INVALID_IMAGE;
  auto m = new Module();
  size_t end = size_of(image), at = 16;
  bool found = false;
  while (at < end) {
    uint16_t kind;
    uint32_t own, arch;
    uint64_t length;
    memcpy(&kind, image + at, 2), memcpy(&own, image + at + 4, 4), memcpy(&length, image + at + 8, 8);
    memcpy(&arch, image + at + 28, 4);
    if (kind == 2 && (long)arch / 10 == settings["major"] && (long)arch % 10 <= settings["minor"]) {
      found = true;
      const char* code = image + at + own;
      for (size_t i = 0; i + 6 < length; i++)
        if (!memcmp(code + i, ".text.", 6)) m->names.insert(code + i + 6);
    }
    at += own + length;
  }
  auto r = registered.find(std::string(image, end));
  if (!found) {
    delete m;
    return NO_BINARY;
  }
  m->library = r == registered.end() ? nullptr : dlopen(r->second.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (r != registered.end() && !m->library) {
    complaint = dlerror();
    delete m;
    return INVALID_IMAGE;
  }
  counts["modules"]++;
  *out = m;
  return OK;
}
int cuModuleUnload(void* module) { counts["modules"]--; finish(); delete (Module*)module; return OK; }
int cuModuleGetFunction(void** out, void* module, const char* name) {
  auto m = (Module*)module;
  if (!m->names.count(name)) return NOT_FOUND;
  Function f = {name, nullptr, 0, 0, {}};
  if (m->library) {
    auto about = (const int*)dlsym(m->library, (std::string(name) + "__about").c_str());
    f.run = (Kernel)dlsym(m->library, (std::string(name) + "__run").c_str());
    if (!about || !f.run) return NOT_FOUND;
    f.meets = about[0], f.arrays = about[1];
    f.sizes.assign(about + 3, about + 3 + about[2]);
  }
  *out = &(m->functions[name] = f);
  return OK;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void*, void** arguments, void** extra) {
  auto f = (Function*)function;
  if (!gx || !gy || !gz || gx > 2147483647u || gy > 65535 || gz > 65535 || bx * by * bz > 1024 || !bx || !by || !bz || bz > 64 ||
      shared || extra)
    return INVALID;
  std::vector<uint64_t> values;
  for (size_t i = 0; i < f->sizes.size(); i++) {
    uint64_t v = 0;
    memcpy(&v, arguments[i], f->sizes[i]);
    values.push_back(v);
  }
  Function copy = *f;
  return send([=] { return launched(copy, {gx, gy, gz}, {bx, by, bz}, values); });
}

int cuStreamBeginCapture_v2(void*, int) { if (drawn) return CAPTURING; drawn = new Graph(); return OK; }
int cuStreamEndCapture(void*, void** out) { *out = drawn; drawn = nullptr; counts["graphs"]++; return OK; }
int cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
  if (settings["refused"]) return OUT_OF_MEMORY;
  counts["executables"]++;
  *out = new Graph(*(Graph*)graph);
  return OK;
}
int cuGraphLaunch(void* graph, void*) {
  counts["graph launches"]++;
  Graph g = *(Graph*)graph;
  return send([g] {
    for (auto& w : g.work)
      if (int code = w()) return code;
    return (int)OK;
  });
}
int cuGraphExecDestroy(void* g) { counts["executables"]--; delete (Graph*)g; return OK; }
int cuGraphDestroy(void* g) { counts["graphs"]--; delete (Graph*)g; return OK; }
}
