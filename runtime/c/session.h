// One row that is fed: a prompt in chunks, then one token at a time; as runtime/session.py feeds it.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "manifest.h"

namespace wasat {

class Engine;  // a loaded artifact
std::shared_ptr<Engine> start(const std::string &folder, const wasat_load_options &options);
const Manifest &manifest_of(const Engine &engine);

class Session {
 public:
  explicit Session(std::shared_ptr<Engine> engine);
  ~Session();
  int64_t limit() const;                                   // most positions; 0: the model states none
  int64_t vocab() const;                                   // tokens from 0 on that it can be fed
  void open(int64_t context);                              // empties the row, for so many positions
  const std::vector<float> &step(const std::vector<int64_t> &tokens);  // the logits after the last one

 private:
  struct Parts;
  std::unique_ptr<Parts> p_;
};

}  // namespace wasat
