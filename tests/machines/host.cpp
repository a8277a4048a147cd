// A program that runs an artifact's library on TVM's runtime alone. It reads lines:
//   tensor NAME CODE BITS RANK DIM... [FILE OFFSET]    zeros, or what stands there in the file
//   set NAME NUMBER                                    the first element, an i64
//   call ENTRY NAME...                                 keeps the results
//   greedy NAME                                        the largest of the first result's last row: printed, and set in NAME
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

struct Aligned {
  void AllocData(DLTensor* t) {
    size_t size = (ffi::GetDataSize(*t) + 63) / 64 * 64 + 64;
    t->data = std::memset(aligned_alloc(64, size), 0, size);
  }
  void FreeData(DLTensor* t) { free(t->data); }
};

int main(int, char** files) {
  ffi::Module library = ffi::Module::LoadFromFile(files[1]);
  ffi::Module vm = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  vm->GetFunction("vm_initialization").value()(int(kDLCPU), 0, 2);
  std::map<std::string, ffi::Tensor> tensors;
  ffi::Any results;
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream line(text);
    std::string command, name;
    line >> command >> name;
    if (command == "tensor") {
      int code, bits, rank;
      line >> code >> bits >> rank;
      std::vector<int64_t> dims(rank);
      for (auto& d : dims) line >> d;
      ffi::Tensor t = ffi::Tensor::FromNDAlloc(Aligned(), ffi::Shape(dims), DLDataType{uint8_t(code), uint8_t(bits), 1}, {kDLCPU, 0});
      std::string path;
      long offset;
      if (line >> path >> offset) {
        FILE* f = fopen(path.c_str(), "rb");
        size_t size = ffi::GetDataSize(t);
        if (!f || fseek(f, offset, SEEK_SET) || fread(t.data_ptr(), 1, size, f) != size) return 3;
        fclose(f);
      }
      tensors.insert_or_assign(name, t);
    } else if (command == "set") {
      int64_t value;
      line >> value;
      static_cast<int64_t*>(tensors.at(name).data_ptr())[0] = value;
    } else if (command == "call") {
      std::vector<ffi::AnyView> arguments;
      for (std::string a; line >> a;) arguments.push_back(tensors.at(a));
      vm->GetFunction(name).value().CallPacked(arguments.data(), int(arguments.size()), &results);
    } else if (command == "greedy") {
      ffi::Tensor logits = results.cast<ffi::Array<ffi::Tensor>>()[0];
      int64_t width = logits.size(logits.ndim() - 1), best = 0;
      const float* row = static_cast<float*>(logits.data_ptr()) + (ffi::GetDataSize(logits) / 4 - width);
      for (int64_t i = 1; i < width; ++i)
        if (row[i] > row[best]) best = i;
      static_cast<int64_t*>(tensors.at(name).data_ptr())[0] = best;
      std::cout << best << std::endl;
    } else {
      return 2;
    }
  }
}
